"""Attention over the KV cache, in the ways that devices and kinds of steps need."""
