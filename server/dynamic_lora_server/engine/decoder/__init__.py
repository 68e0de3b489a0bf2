"""Decoder layers in C++ in the place of the model's own."""
