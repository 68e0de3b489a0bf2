"""From request bodies to what is generated."""
