"""The files of an adapter, read without trusting them."""
