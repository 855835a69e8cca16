"""What proves and accompanies an exported model: gate, int8, bundle, C++, web page and Ray."""
