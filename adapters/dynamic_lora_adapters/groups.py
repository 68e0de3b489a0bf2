"""Projection groups: linear layers that read the same input, treated as one.

Query, key and value projections (and gate and up) share their input. As one
group they need one base product, one `x·A` and one `·B` per adapter:

    W = [Wq; Wk; Wv]     A = [Aq; Ak; Av]     B = blockdiag(Bq, Bk, Bv)

Which layers form a group is observed in a trial run, not guessed from names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dynamic_lora_adapters.terms import LinearTerms

RANK_MULTIPLE = 8
# Costs are measured with adapters of this rank on every layer but the output head.
PROBE_RANK = 16


@dataclass(frozen=True, slots=True)
class ProjectionGroup:
    """Module paths with a common input, and the output width of each.

    `is_head` says that it is the output head, which reads only the rows whose
    logits are wanted.
    """

    paths: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]
    is_head: bool = False

    @property
    def out_features(self) -> int:
        """Width of the joined output."""
        return sum(self.widths)


class GroupShape(NamedTuple):
    """Which terms an adapter has on a group; `rank` is padded to a multiple of RANK_MULTIPLE."""

    rank: int = 0
    scale: bool = False
    dense: bool = False
    bias: bool = False


_NOTHING = LinearTerms()
# Rows of other adapters divide by 1 + scale; closer to 0 that would lose digits.
_SMALLEST_SCALE = 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class GroupTerms:
    """An adapter's terms on one group, its members side by side.

    Shapes: a [rank, in], b [rank, out] with the scaling folded in, scale
    [out], dense [out, in], bias [out]. `rank` is the sum of the members'
    ranks, padded with zeros so that adapters of nearly the same shape share a
    table. What a member lacks is zero; `columns` [rank, 2], int64, is the range
    outside which a row of b is.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def foldable(self) -> bool:
        """Whether there is anything that a weight can hold."""
        return self.a is not None or self.scale is not None or self.dense is not None

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] with every term but `bias` in it, in float32, on its device."""

        def exact(part: torch.Tensor) -> torch.Tensor:
            return part.to(weight.device, torch.float32)

        folded = exact(weight)
        if self.scale is not None:
            folded = folded + folded * exact(self.scale)[:, None]
        if self.a is not None and self.b is not None:
            folded = torch.addmm(folded, exact(self.b).T, exact(self.a))
        return folded if self.dense is None else folded + exact(self.dense)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of `fold`, in float32, up to rounding."""

        def exact(part: torch.Tensor) -> torch.Tensor:
            return part.to(weight.device, torch.float32)

        plain = exact(weight)
        if self.dense is not None:
            plain = plain - exact(self.dense)
        if self.a is not None and self.b is not None:
            plain = torch.addmm(plain, exact(self.b).T, exact(self.a), alpha=-1)
        return plain if self.scale is None else plain / (1 + exact(self.scale))[:, None]


def group_shape(group: ProjectionGroup, terms: Mapping[str, LinearTerms]) -> GroupShape:
    """What `join_terms` would give, unjoined: the signature entry of a slab that can hold it."""
    members = _members(group, terms)
    rank = _padded_rank(members)
    return GroupShape(
        rank,
        scale=any(m.scale is not None for m in members),
        dense=any(m.dense is not None for m in members),
        bias=any(m.bias is not None for m in members),
    )


def probe_shape(group: ProjectionGroup) -> GroupShape:
    """What an adapter of PROBE_RANK on every layer but the output head has on this group."""
    return GroupShape(0 if group.is_head else _padded(PROBE_RANK * len(group.paths)))


def reversible(terms: Mapping[str, LinearTerms]) -> bool:
    """Whether rows' base outputs can be had back from folded weights without loss."""
    return all(
        one.scale is None or bool(((1 + one.scale).abs() >= _SMALLEST_SCALE).all())
        for one in terms.values()
    )


def join_terms(
    groups: Sequence[ProjectionGroup], terms: Mapping[str, LinearTerms]
) -> Iterator[GroupTerms]:
    """An adapter's terms group by group, joined as they are asked for; empty where it has none."""
    return (_join(group, _members(group, terms)) for group in groups)


def _members(group: ProjectionGroup, terms: Mapping[str, LinearTerms]) -> list[LinearTerms]:
    return [terms.get(path, _NOTHING) for path in group.paths]


def _padded_rank(members: Sequence[LinearTerms]) -> int:
    return _padded(sum(m.a.shape[0] for m in members if m.a is not None))


def _padded(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def _join(group: ProjectionGroup, members: Sequence[LinearTerms]) -> GroupTerms:
    a, b, columns = _join_factors(group, members)
    return GroupTerms(
        a=a,
        b=b,
        columns=columns,
        scale=_stack(group, [m.scale for m in members], (group.out_features,)),
        dense=_stack(group, [m.dense for m in members], (group.out_features, group.in_features)),
        bias=_stack(group, [m.bias for m in members], (group.out_features,)),
    )


def _join_factors(
    group: ProjectionGroup, members: Sequence[LinearTerms]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None]:
    padded = _padded_rank(members)
    if not padded:
        return None, None, None
    a = torch.zeros(padded, group.in_features)
    b = torch.zeros(padded, group.out_features)
    columns = torch.zeros(padded, 2, dtype=torch.long)
    row = column = 0
    for member, width in zip(members, group.widths, strict=True):
        if member.a is not None and member.b is not None:
            stop = row + member.a.shape[0]
            a[row:stop] = member.a
            b[row:stop, column : column + width] = member.b.T
            columns[row:stop] = torch.tensor([column, column + width])
            row = stop
        column += width
    return a, b, columns


def _stack(
    group: ProjectionGroup, parts: Sequence[torch.Tensor | None], shape: tuple[int, ...]
) -> torch.Tensor | None:
    if all(part is None for part in parts):
        return None
    stacked = torch.zeros(shape)
    for part, rows in zip(parts, stacked.split(list(group.widths)), strict=True):
        if part is not None:
            rows.copy_(part)
    return stacked
