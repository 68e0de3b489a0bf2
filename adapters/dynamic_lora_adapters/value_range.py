"""How large the values of an adapter may be, in the number format they are served in.

A value can be finite and still end in an infinity, one product further on. An
infinity in one slot is not harmless to others either: where a kernel masks by
multiplying with zero, it makes a NaN.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms, LinearTerms, PromptTerms

if TYPE_CHECKING:
    import torch

# A gated layer multiplies two values that grow with an adapter's, and the norm that
# follows squares them: the fourth power, summed over a row, must stay below 3.4e38.
LARGEST = 1e8
# Room for the values that an adapter's are multiplied with: in float16 it is scarce.
_ROOM = 8.0

_Sizes = Iterator[tuple[str, float]]


def check_range(terms: AdapterTerms, dtype: "torch.dtype") -> None:
    """Raise `InvalidAdapter`, naming the place, for values too large to compute with in `dtype`."""
    found = find_too_large(terms, dtype)
    if found is None:
        return
    place, size = found
    raise InvalidAdapter(
        f"The adapter's values for {place} reach {size:.3g}, which is too large to compute with "
        f"in {str(dtype).removeprefix('torch.')}.",
        field=place.strip("'"),
        fix="The training diverged: train again with a lower learning rate.",
    )


def balanced(a: "torch.Tensor", b: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """The same product of factors, with b's small values brought up to a's. float16 holds both.

    Shapes: a [rank, in], b [rank, out]. Each rank is moved by a power of two, which rounds
    nothing.
    """
    ratio = a.abs().amax(1) / b.abs().amax(1)
    exponents = (ratio.log2() / 2).nan_to_num(0.0, 0.0, 0.0).round().clamp(0, 60)
    factor = exponents.exp2()[:, None]
    return a / factor, b * factor


def find_too_large(terms: AdapterTerms, dtype: "torch.dtype") -> tuple[str, float] | None:
    """The first place whose values are too large or not finite in `dtype`, and their size.

    No single value may be above 1e8 or an eighth of what `dtype` holds, and no
    output of factors or a dense delta above 1e8 for inputs of size 1.
    """
    import torch

    largest = min(LARGEST, torch.finfo(dtype).max / _ROOM)
    if _all_surely_small(terms, largest):
        return None
    doubtful = {p: one for p, one in terms.linears.items() if not _surely_small(one, largest)}
    terms = dataclasses.replace(terms, linears=doubtful)
    for sizes, limit in ((_values(terms), largest), (_products(terms), LARGEST)):
        for place, size in sizes:
            if not size <= limit:  # NaN too
                return place, size
    return None


def _all_surely_small(terms: AdapterTerms, largest: float) -> bool:
    """Whether an adapter of factors alone is, as a whole, far within both limits: most are.

    One norm of all factors bounds that of each, and takes a fraction of their norms one by one.
    """
    from torch.nn.utils import get_total_norm

    linears = terms.linears.values()
    if terms.embeddings or terms.overrides or terms.prompt is not None:
        return False
    if any(part is not None for one in linears for part in (one.scale, one.dense, one.bias)):
        return False
    factors = [part for one in linears for part in (one.a, one.b) if part is not None]
    if not factors:
        return False
    norm = float(get_total_norm(factors, foreach=True))
    width = max(one.a.shape[1] for one in linears if one.a is not None)
    return norm <= largest / 2 and norm**2 * math.sqrt(width) <= LARGEST / 2


def _surely_small(term: LinearTerms, largest: float) -> bool:
    """Whether factors alone, by their norms, are far within both limits: most are."""
    import torch

    if term.a is None or term.b is None or not term.a.numel():
        return False
    if any(part is not None for part in (term.scale, term.dense, term.bias)):
        return False
    a, b = (float(torch.linalg.vector_norm(factor)) for factor in (term.a, term.b))
    # By Cauchy and Schwarz; half, for the norms are rounded.
    return max(a, b) <= largest / 2 and b * a * math.sqrt(term.a.shape[1]) <= LARGEST / 2


def _values(terms: AdapterTerms) -> _Sizes:
    for path, linear in terms.linears.items():
        parts = (linear.a, linear.b, linear.scale, linear.dense, linear.bias)
        yield from ((repr(path), _size(part)) for part in parts if part is not None)
    for path, embedding in terms.embeddings.items():
        tables = (embedding.a, embedding.b, embedding.rows)
        yield from ((repr(path), _size(table)) for table in tables if table is not None)
    for path, module in terms.overrides.items():
        for name, value in module.parameters.items():
            yield repr(f"{path}.{name}"), _size(value)
    if terms.prompt is not None:
        yield from _prompt_values(terms.prompt)


def _prompt_values(prompt: PromptTerms) -> _Sizes:
    if prompt.embeddings is not None:
        yield "the virtual tokens", _size(prompt.embeddings)
    for what, layers in (("keys", prompt.keys), ("values", prompt.values)):
        for layer, tensor in enumerate(layers):
            yield f"the virtual tokens' {what} in layer {layer}", _size(tensor)


def _products(terms: AdapterTerms) -> _Sizes:
    """What factors and dense deltas come to at most, for inputs of size 1 and single tokens."""
    changed: dict[str, LinearTerms | EmbeddingTerms] = {**terms.linears, **terms.embeddings}
    for path, term in changed.items():
        if isinstance(term, LinearTerms) and term.dense is not None:
            yield repr(path), _size(term.dense.abs().sum(1))
        if term.a is not None and term.b is not None and term.a.numel():
            inner = term.a.abs()
            inner = inner.sum(1) if isinstance(term, LinearTerms) else inner.amax(1)
            yield repr(path), _size(term.b.abs() @ inner)


def _size(tensor: "torch.Tensor") -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
