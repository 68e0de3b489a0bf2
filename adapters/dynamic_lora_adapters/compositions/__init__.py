"""Weighted sums of adapters: as text, as values, and as terms."""
