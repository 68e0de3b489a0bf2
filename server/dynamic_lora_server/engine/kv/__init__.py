"""The KV cache: its tensors, who has which of its space, and the prefixes kept in it."""
