"""The columns of the table: tiny models, and what their modules are called."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from tests.support.models import TINY_MODELS, TINY_MOE_MODELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names of modules as a PEFT config lists them.

    `attention` are the input projections of the attention (each a linear layer
    or a `Conv1D`), `feedforward` the projections out of the MLP (none where
    the experts are one parameter), `norm` a normalisation.
    """

    attention: tuple[str, ...] = ("q_proj", "v_proj")
    feedforward: tuple[str, ...] = ("down_proj",)
    norm: str = "input_layernorm"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    layers: str = "layers"

    @property
    def targets(self) -> list[str]:
        """What a kind adapts unless it says otherwise."""
        return [*self.attention, *self.feedforward]


ARCHITECTURES: Mapping[str, Layout] = {
    "llama": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "mistral": Layout(),
    "gemma2": Layout(),
    "gemma3_text": Layout(),
    "phi3": Layout(attention=("qkv_proj",)),
    "gpt2": Layout(
        attention=("c_attn",), feedforward=("mlp.c_proj",), norm="ln_f", embedding="wte", layers="h"
    ),
    "gpt_neox": Layout(
        attention=("query_key_value",),
        feedforward=("dense_4h_to_h",),
        norm="final_layer_norm",
        embedding="embed_in",
    ),
    "opt": Layout(feedforward=("fc2",), norm="self_attn_layer_norm"),
    "olmo2": Layout(norm="post_attention_layernorm"),
    "granite": Layout(),
    "qwen3_moe": Layout(feedforward=()),
    "mixtral": Layout(feedforward=()),
}
"""Layouts by `model_type`, in the order of the table's columns."""


def build_base(architecture: str, tied: bool | None = None) -> PreTrainedModel:
    """A fresh tiny model, the same every time; `tied` overrides whether head and input share."""
    overrides = {} if tied is None else {"tie_word_embeddings": tied}
    return (TINY_MODELS | TINY_MOE_MODELS)[architecture](**overrides)
