"""The version of the distribution; the build and the change log follow it."""

__version__ = "0.2.0"
