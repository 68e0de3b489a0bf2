"""The terms of a composition, out of the terms of its parts.

A weighted sum is exact: low-rank factors stand side by side, with the weight in
`b`; all other terms are summed in fp32. The merge strategies are PEFT's own
functions on the dense deltas, one linear layer at a time; DARE's masks alone are drawn here.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from dynamic_lora_adapters.compositions.composition import Merge, Strategy
from dynamic_lora_adapters.errors import UnsupportedAdapter
from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms, LinearTerms
from dynamic_lora_adapters.threads import single_threaded
from dynamic_lora_adapters.value_range import find_too_large

if TYPE_CHECKING:
    import torch

GivenUp = Callable[[], bool]
"""Whether nobody waits for it any more."""
CheckShapes = Callable[[AdapterTerms], object]
"""Gets terms of the shapes of what is to be computed, on no device; raises if it must not be."""

T = TypeVar("T", LinearTerms, EmbeddingTerms)
Weighted = Sequence[tuple[T, float]]


class NobodyWaits(Exception):
    """What was being computed is wanted no more."""


@single_threaded()
def compose(
    parts: Sequence[tuple[AdapterTerms, float]],
    *,
    names: Sequence[str] = (),
    dtype: "torch.dtype | None" = None,
) -> AdapterTerms:
    """The weighted sum of adapters.

    `names` are the adapters' for messages, `dtype` is what the sum is served in
    (float32 if None). Raises UnsupportedAdapter, naming the adapter, for what
    is no sum: replaced modules, prompts, and adapters that act from invocation
    tokens on. Alone and with weight 1 those pass. Also raised for a sum whose
    values are too large to compute with.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    for index, (terms, _) in enumerate(parts):
        _refuse_what_is_no_sum(terms, _name(names, index))
    total = AdapterTerms(
        linears=_by_module([(t.linears, w) for t, w in parts], _sum_linears),
        embeddings=_by_module([(t.embeddings, w) for t, w in parts], _sum_embeddings),
    )
    _refuse_overflow(total, dtype)
    return total


@single_threaded()
def merge(
    parts: Sequence[tuple[AdapterTerms, float]],
    how: Merge,
    *,
    names: Sequence[str] = (),
    dtype: "torch.dtype | None" = None,
    check_shapes: CheckShapes = lambda _: None,
    given_up: GivenUp = lambda: False,
) -> AdapterTerms:
    """The deltas merged by a strategy, as dense terms in `dtype`; needs PEFT.

    On each layer the adapters that have a delta there take part, as in PEFT's
    `add_weighted_adapter`. DARE's draws are seeded by the layer's path. Raises
    UnsupportedAdapter, naming the adapter, where it has more than deltas, and
    as `compose` does for values that are too large; what `check_shapes` does, before anything is
    computed; NobodyWaits between two layers once it is `given_up`.
    """
    for index, (terms, _) in enumerate(parts):
        _refuse_more_than_deltas(terms, _name(names, index), how)
    by_path: dict[str, list[tuple[LinearTerms, float]]] = {}
    for terms, weight in parts:
        for path, linear in terms.linears.items():
            by_path.setdefault(path, []).append((linear, weight))
    check_shapes(_shapes({path: own[0][0] for path, own in by_path.items()}))
    linears = {}
    for path in sorted(by_path):
        if given_up():
            raise NobodyWaits
        deltas = [_delta(linear) for linear, _ in by_path[path]]
        dense = _merged(deltas, [weight for _, weight in by_path[path]], how, path)
        _refuse_overflow(AdapterTerms(linears={path: LinearTerms(dense=dense)}), dtype)
        # At once: in float32 all layers of a large model together may be more than there is.
        linears[path] = LinearTerms(dense=dense if dtype is None else dense.to(dtype))
    return AdapterTerms(linears=linears)


def _shapes(layers: Mapping[str, LinearTerms]) -> AdapterTerms:
    """Dense terms without values, for layers that have a delta."""
    import torch

    dense = {path: torch.empty(_delta_shape(one), device="meta") for path, one in layers.items()}
    return AdapterTerms(linears={path: LinearTerms(dense=one) for path, one in dense.items()})


def _refuse_overflow(total: AdapterTerms, dtype: "torch.dtype | None") -> None:
    """Weights and densities can take terms that were sound beyond what `dtype` holds."""
    import torch

    found = find_too_large(total, dtype or torch.float32)
    if found is not None:
        raise UnsupportedAdapter(
            f"The sum has values on {found[0]} that are too large to compute with, or not finite.",
            field="adapter",
            fix="Use smaller weights, or a larger density.",
        )


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"number {index + 1}"


def _refuse_what_is_no_sum(terms: AdapterTerms, name: str) -> None:
    for present, what in (
        (terms.overrides, "replaces whole modules of the base model"),
        (terms.prompt is not None, "is a prompt of virtual tokens"),
        (terms.invocation_ids, "acts only from its invocation tokens on"),
    ):
        if present:
            raise UnsupportedAdapter(
                f"The adapter {name!r} {what}, and so has no weighted sum with others.",
                field="adapter",
                fix="Use it alone, with weight 1.",
            )


def _refuse_more_than_deltas(terms: AdapterTerms, name: str, how: Merge) -> None:
    _refuse_what_is_no_sum(terms, name)
    others = [("embeddings", bool(terms.embeddings))]
    for linear in terms.linears.values():
        others.append(("row scales", linear.scale is not None))
        others.append(("biases", linear.bias is not None))
    for what, present in others:
        if present:
            raise UnsupportedAdapter(
                f"The adapter {name!r} changes {what}; {how.strategy} merges deltas of "
                "linear layers alone.",
                field="merge_strategy",
                fix="Use merge_strategy linear.",
            )


def _by_module(
    parts: Iterable[tuple[Mapping[str, T], float]], add: Callable[[Weighted[T]], T]
) -> dict[str, T]:
    by_path: dict[str, list[tuple[T, float]]] = {}
    for modules, weight in parts:
        for path, terms in modules.items():
            by_path.setdefault(path, []).append((terms, weight))
    return {path: add(own) for path, own in by_path.items()}


def _sum_linears(parts: Weighted[LinearTerms]) -> LinearTerms:
    a, b = _side_by_side([(t.a, t.b, w) for t, w in parts])
    return LinearTerms(
        a=a,
        b=b,
        scale=_sum([(t.scale, w) for t, w in parts]),
        dense=_sum([(t.dense, w) for t, w in parts]),
        bias=_sum([(t.bias, w) for t, w in parts]),
        rank=0 if a is None else a.shape[0],
        scaling=0.0 if a is None else 1.0,
    )


def _sum_embeddings(parts: Weighted[EmbeddingTerms]) -> EmbeddingTerms:
    a, b = _side_by_side([(t.a, t.b, w) for t, w in parts])
    token_ids, rows = _sum_rows([(t.token_ids, t.rows, w) for t, w in parts])
    return EmbeddingTerms(
        a=a,
        b=b,
        token_ids=token_ids,
        rows=rows,
        rank=0 if a is None else a.shape[0],
        scaling=0.0 if a is None else 1.0,
    )


def _side_by_side(
    factors: Sequence[tuple["torch.Tensor | None", "torch.Tensor | None", float]],
) -> tuple["torch.Tensor | None", "torch.Tensor | None"]:
    import torch

    pairs = [(a, b * w) for a, b, w in factors if a is not None and b is not None]
    if not pairs:
        return None, None
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def _sum(tensors: Sequence[tuple["torch.Tensor | None", float]]) -> "torch.Tensor | None":
    total = None
    for tensor, weight in tensors:
        if tensor is not None:
            total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
    return total


def _sum_rows(
    parts: Sequence[tuple["torch.Tensor | None", "torch.Tensor | None", float]],
) -> tuple["torch.Tensor | None", "torch.Tensor | None"]:
    import torch

    own = [(i, rows * w) for i, rows, w in parts if i is not None and rows is not None]
    if not own:
        return None, None
    token_ids, positions = torch.cat([i for i, _ in own]).unique(return_inverse=True)
    rows = torch.cat([rows for _, rows in own])
    return token_ids, rows.new_zeros(len(token_ids), rows.shape[1]).index_add_(0, positions, rows)


def _delta(terms: LinearTerms) -> "torch.Tensor":
    low_rank = None if terms.a is None or terms.b is None else terms.b @ terms.a
    delta = _sum([(low_rank, 1.0), (terms.dense, 1.0)])
    assert delta is not None, "a linear layer without terms"
    return delta


def _delta_shape(terms: LinearTerms) -> tuple[int, ...]:
    if terms.dense is not None:
        return tuple(terms.dense.shape)
    assert terms.a is not None and terms.b is not None
    return terms.b.shape[0], terms.a.shape[1]


def _merged(
    deltas: "list[torch.Tensor]", weights: Sequence[float], how: Merge, path: str
) -> "torch.Tensor":
    """One layer by PEFT's functions, which warn at density 1: there nothing is pruned."""
    import torch
    from peft.utils import merge_utils

    column = torch.tensor(weights, dtype=torch.float32)
    if how.density < 1:
        match how.strategy:
            case Strategy.MAGNITUDE_PRUNE:
                return merge_utils.magnitude_prune(deltas, column, how.density)
            case Strategy.TIES:
                return merge_utils.ties(deltas, column, how.density, how.sign_method.value)
        deltas = _thinned(deltas, how.density, path)
    if not how.strategy.elects_sign:
        return merge_utils.task_arithmetic(deltas, column)
    stacked = torch.stack(deltas)
    mask = merge_utils.calculate_majority_sign_mask(stacked, method=how.sign_method.value)
    column = merge_utils.reshape_weight_task_tensors(stacked, column)
    return merge_utils.disjoint_merge(stacked * column, mask)


def _thinned(deltas: "list[torch.Tensor]", density: float, path: str) -> "list[torch.Tensor]":
    """What DARE keeps of the deltas, as PEFT's `random_pruning` draws it.

    That draws from the global generator, whose one state other threads change meanwhile: the
    same composition would not be the same numbers.
    """
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    chances = (torch.full_like(one, density) for one in deltas)
    masks = (torch.bernoulli(one, generator=generator) for one in chances)
    return [one * mask / density for one, mask in zip(deltas, masks, strict=True)]
