"""Projection groups: linear layers that read the same input, treated as one.

Query, key and value projections (and gate and up) share their input. As one
group they need one base product, one `x·A` and one `·B` per adapter:

    W = [Wq; Wk; Wv]     A = [Aq; Ak; Av]     B = blockdiag(Bq, Bk, Bv)

Which layers form a group is observed in a trial run, not guessed from names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.weights import LoraFactors

RANK_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class ProjectionGroup:
    """Module paths with a common input, and the output width of each."""

    paths: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Width of the joined output."""
        return sum(self.widths)


@dataclass(frozen=True, slots=True)
class GroupFactors:
    """An adapter's delta on one group: a [rank, in], b [rank, out], scaling folded in.

    `rank` is the sum of the members' ranks, padded with zeros to a multiple of
    RANK_MULTIPLE so that adapters of nearly the same shape share a table.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def group_factors(
    groups: Sequence[ProjectionGroup], factors: Mapping[str, LoraFactors]
) -> list[GroupFactors | None]:
    """Join an adapter's per-layer factors group by group; None where it has none."""
    return [_join(group, factors) for group in groups]


def _join(group: ProjectionGroup, factors: Mapping[str, LoraFactors]) -> GroupFactors | None:
    rank = sum(factors[path].a.shape[0] for path in group.paths if path in factors)
    if not rank:
        return None
    padded = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    a = torch.zeros(padded, group.in_features)
    b = torch.zeros(padded, group.out_features)
    row = column = 0
    for path, width in zip(group.paths, group.widths, strict=True):
        if (member := factors.get(path)) is not None:
            stop = row + member.a.shape[0]
            a[row:stop] = member.a
            b[row:stop, column : column + width] = member.b.T
            row = stop
        column += width
    return GroupFactors(a, b)
