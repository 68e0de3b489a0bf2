"""The base model: where it comes from, how it is loaded, and what tells it from others."""
