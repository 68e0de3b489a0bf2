"""Tiny models, tokenizers and adapters that the tests make for themselves."""
