"""DoRA (Liu et al. 2024): a layer's weight keeps a trained length for each output.

`W' = m / n * (W0 + s B A)` with n the row norms of `W0 + s B A`. The norms
depend on nothing but weights, so they are computed once, when the adapter is
read: what remains is a factor on the base's output and a scaled B.
"""

import dataclasses
from typing import TYPE_CHECKING

from dynamic_lora_adapters.terms import EmbeddingTerms, LinearTerms

if TYPE_CHECKING:
    import torch


def dora_terms(
    plain: LinearTerms, weight: "torch.Tensor", magnitude: "torch.Tensor"
) -> LinearTerms:
    """Give the terms of a plain LoRA the row lengths `magnitude` [out].

    `weight` [out, in] is the base layer's; `plain.bias` is left alone, as PEFT
    scales no bias.
    """
    import torch

    assert plain.a is not None
    assert plain.b is not None
    adapted = torch.addmm(weight, plain.b, plain.a)
    if plain.dense is not None:
        adapted += plain.dense
    factor = magnitude / torch.linalg.norm(adapted, dim=1)
    return dataclasses.replace(
        plain,
        b=plain.b * factor[:, None],
        dense=None if plain.dense is None else plain.dense * factor[:, None],
        scale=factor - 1,
    )


def dora_embedding(
    plain: EmbeddingTerms, table: "torch.Tensor", magnitude: "torch.Tensor"
) -> EmbeddingTerms:
    """Give an embedding's LoRA the column lengths `magnitude` [dim].

    `table` [vocab, dim] is the base's. All its rows change.
    """
    import torch

    assert plain.a is not None
    assert plain.b is not None
    changed = table
    if plain.token_ids is not None and plain.rows is not None:
        changed = table.index_add(0, plain.token_ids, plain.rows)
    norms = torch.linalg.norm(torch.addmm(changed, plain.a.T, plain.b.T), dim=0)
    factor = magnitude / norms
    return dataclasses.replace(
        plain,
        b=plain.b * factor[:, None],
        token_ids=torch.arange(table.shape[0]),
        rows=changed * factor - table,
    )
