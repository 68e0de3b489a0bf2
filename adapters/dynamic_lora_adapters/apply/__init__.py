"""An adapter's terms in a running model: its layers, their products, and merging."""
