"""Decoding steps of fixed shape, replayed as CUDA graphs."""
