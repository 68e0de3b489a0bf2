"""Kinds that train one number for each feature of a layer.

(IA)^3 (Liu et al. 2022) scales its outputs or its inputs; BEFT adds to its outputs.
"""

from typing import Any

from dynamic_lora_adapters.kinds.folded import PristineLinears, finite_delta
from dynamic_lora_adapters.kinds.replica import ADAPTER
from dynamic_lora_adapters.terms import LinearTerms


def ia3_terms(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """The terms of one layer; a feed-forward one scales its inputs, another its outputs.

    PEFT scales an output with the base's bias in it, `scale` without.
    """
    change = layer.ia3_l[ADAPTER].detach().flatten() - 1
    if layer.is_feedforward:
        return LinearTerms(dense=finite_delta(path, linears.weight(path) * change))
    bias = linears.bias(path)
    return LinearTerms(
        scale=finite_delta(path, change),
        bias=None if bias is None else finite_delta(path, bias * change),
    )


def beft_terms(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """A bias of its own for the layer, whether or not the base has one there."""
    del linears
    return LinearTerms(bias=finite_delta(path, layer.beft_bias[ADAPTER].flatten()))
