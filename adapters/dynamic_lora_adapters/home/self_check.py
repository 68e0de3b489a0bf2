"""A probe of each adapter: what its terms lose in the number format they are served in."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.geometry import BaseGeometry, LinearShape
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_adapters.value_range import balanced

if TYPE_CHECKING:
    import torch

_NUM_ROWS = 8
_SEED = 0


def self_check(
    terms: AdapterTerms,
    geometry: BaseGeometry,
    dtype: "torch.dtype",
    factor_dtype: "torch.dtype | None" = None,
) -> float:
    """The largest relative difference that serving in `dtype` makes to a layer's delta.

    Each linear layer's terms are applied to a seeded random batch in double precision and
    in `dtype`, the latter with low-rank factors in `factor_dtype` if that is given; the
    difference is relative to the largest value of the layer's delta. 0 for an adapter
    without terms on linear layers. Raises `InvalidAdapter` naming the layer if its delta
    overflows in `dtype`.
    """
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    worst = 0.0
    for path, term in terms.linears.items():
        shape = geometry.linear(path)
        assert shape is not None
        # Rounded first: what the inputs lose is not the adapter's doing.
        x, y = (batch.to(dtype) for batch in _probe(shape, generator))
        reference = _delta(term, x, y, torch.float64)
        served = _delta(_rounded(term, factor_dtype or dtype), x, y, dtype).double()
        if not bool(served.isfinite().all()):
            raise InvalidAdapter(
                f"The delta on {path!r} overflows in {str(dtype).removeprefix('torch.')}.",
                field=path,
                fix="Serve the base model in another dtype.",
            )
        largest = float(reference.abs().max())
        if largest:
            worst = max(worst, float((served - reference).abs().max()) / largest)
    return worst


def _probe(shape: LinearShape, generator: "torch.Generator") -> "Iterator[torch.Tensor]":
    import torch

    for width in (shape.in_features, shape.out_features):
        yield torch.randn(_NUM_ROWS, width, generator=generator)


def _rounded(term: LinearTerms, dtype: "torch.dtype") -> LinearTerms:
    """With factors as a slot of `dtype` holds them."""
    import torch

    from dynamic_lora_adapters.kernels.byte_factors import rounded_to_bytes

    if term.a is None or term.b is None:
        return term
    if dtype == torch.uint8:
        a, b = rounded_to_bytes(term.a.float(), term.b.float())
        return replace(term, a=a, b=b)
    a, b = term.a, term.b.T
    if dtype == torch.float16:
        a, b = balanced(a, b)
    return replace(term, a=a.to(dtype), b=b.T.to(dtype))


def _delta(
    term: LinearTerms, x: "torch.Tensor", y: "torch.Tensor", dtype: "torch.dtype"
) -> "torch.Tensor":
    x, y = x.to(dtype), y.to(dtype)
    delta = y * 0
    if term.scale is not None:
        delta = delta + y * term.scale.to(dtype)
    if term.a is not None and term.b is not None:
        delta = delta + x @ term.a.to(dtype).T @ term.b.to(dtype).T
    if term.dense is not None:
        delta = delta + x @ term.dense.to(dtype).T
    if term.bias is not None:
        delta = delta + term.bias.to(dtype)
    return delta
