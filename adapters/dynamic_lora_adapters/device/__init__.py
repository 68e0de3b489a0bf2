"""Adapters on the device: slabs of slots, what they take, and who leaves."""
