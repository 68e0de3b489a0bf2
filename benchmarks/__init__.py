"""Measurements of a running server. Not part of the installed package."""
