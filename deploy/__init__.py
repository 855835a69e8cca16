"""What proves and accompanies an exported model: gate, int8, bundle, card, report, C++, web page and Ray."""
