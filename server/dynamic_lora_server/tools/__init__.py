"""Calls of functions: what a request offers, how models write calls, and reading them."""
