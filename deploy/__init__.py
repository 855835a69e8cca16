"""What travels with a model or makes it travel: int8, the bundle, the model card, pictures, C++ and a web page."""
