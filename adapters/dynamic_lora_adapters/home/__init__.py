"""The adapters that a server knows, on disk and by name."""
