"""Models of known shapes with random weights, and random adapters for them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms

RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    def build(self, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        """The model with random weights, made where it stays."""
        sizes: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        sizes.pop("name")
        config = LlamaConfig(**sizes, max_position_embeddings=8192, dtype=dtype)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                model: LlamaForCausalLM = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.requires_grad_(False)
        model.eval()
        return model


LLAMA_1B = ModelShape(
    name="llama-1b",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
    tie_word_embeddings=True,
)
LLAMA_8B = ModelShape(
    name="llama-8b",
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
    tie_word_embeddings=False,
)
TINY = ModelShape(
    name="tiny",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    tie_word_embeddings=True,
)


def random_terms(geometry: BaseGeometry) -> AdapterTerms:
    """An adapter of rank 16 on every linear layer but the head."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator) * 0.01

    linears = {
        path: LinearTerms(a=draw(RANK, shape.in_features), b=draw(shape.out_features, RANK))
        for path, shape in geometry.linears.items()
    }
    return AdapterTerms(linears=linears)
