"""Speculative decoding with tokens that were seen before."""
