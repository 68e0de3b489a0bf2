"""PEFT's LoRA, from its config and tensors to terms."""
