"""PEFT adapters of every kind but LoRA, read into the terms that the server applies."""

from dynamic_lora_adapters.kinds.reader import kind_notes, read_kind
from dynamic_lora_adapters.kinds.spec import KindSpec
from dynamic_lora_adapters.kinds.table import KINDS

__all__ = ["KINDS", "KindSpec", "kind_notes", "read_kind"]
