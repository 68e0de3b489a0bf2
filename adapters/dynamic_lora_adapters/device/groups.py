"""Projection groups: linear layers that read the same input, treated as one.

Query, key and value projections (and gate and up) share their input. As one
group they need one base product, one `x·A` and one `·B` per adapter:

    W = [Wq; Wk; Wv]     A = [Aq; Ak; Av]     B = blockdiag(Bq, Bk, Bv)

Which layers form a group is observed in a trial run, not guessed from names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dynamic_lora_adapters.device.spans import Span, reach, spans
from dynamic_lora_adapters.kernels.byte_factors import clear_bytes, write_bytes
from dynamic_lora_adapters.kernels.factor_layout import TILE_RANKS, read_tiles, write_tiles
from dynamic_lora_adapters.terms import LinearTerms
from dynamic_lora_adapters.value_range import balanced

RANK_MULTIPLE = TILE_RANKS
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
_PARTS = ("a", "b", "columns", "scale", "dense", "bias")
# Rows of other adapters divide by 1 + scale; closer to 0 that would lose digits.
_SMALLEST_SCALE = 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class GroupTerms:
    """An adapter's terms on one group, its members side by side.

    Shapes: a [rank, in], b [rank, out] with the scaling folded in, scale
    [out], dense [out, in], bias [out]. `rank` is the sum of the members'
    ranks, padded with zeros so that adapters of nearly the same shape share a
    table. What a member lacks is zero; `columns` [rank, 2], int64, is the range
    outside which a row of b is. Where they are `tiled`, a and b are as FactorLayout.TILES
    or, with elements of eight bits, BYTES says, with the shapes of the tables that hold them.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    tiled: bool = False

    def joined(self) -> "GroupTerms":
        """Themselves: what has been joined stays so."""
        return self

    def fitted(self, dtype: torch.dtype) -> "GroupTerms":
        """The same, with factors that a dtype of few exponents holds too."""
        if self.a is None or self.b is None or dtype != torch.float16:
            return self
        a, b = balanced(self.a, self.b)
        return replace(self, a=a, b=b)

    def write(self, place: "GroupTerms") -> None:
        """Copy the terms to where they are to lie, in the dtype of the place."""
        assert not place.tiled
        for part, target in self.parts(place):
            target.copy_(part)

    def tensors(self) -> list[torch.Tensor]:
        """The parts that there are."""
        every = (getattr(self, name) for name in _PARTS)
        return [part for part in every if part is not None]

    def parts(self, place: "GroupTerms") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The parts that there are, each with its like in `place`."""
        for name in _PARTS:
            part, target = getattr(self, name), getattr(place, name)
            if part is not None:
                yield part, target

    def plain(self, group: ProjectionGroup) -> "GroupTerms":
        """The same with a and b as rows: copies of what lies in tiles."""
        if not self.tiled:
            return self
        if self.a is None or self.b is None:
            return replace(self, tiled=False)
        a, b = read_tiles(self.a, self.b)
        return replace(self, a=a[:, : group.in_features], b=b[:, : group.out_features], tiled=False)

    @property
    def foldable(self) -> bool:
        """Whether there is anything that a weight can hold."""
        return self.a is not None or self.scale is not None or self.dense is not None

    @property
    def low_rank(self) -> bool:
        """Whether factors are all that a weight could hold."""
        return self.scale is None and self.dense is None

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] with every term but `bias` in it, in float32, on its device."""
        assert not self.tiled

        def exact(part: torch.Tensor) -> torch.Tensor:
            return part.to(weight.device, torch.float32)

        folded = exact(weight)
        if self.scale is not None:
            folded = folded + folded * exact(self.scale)[:, None]
        if self.a is not None and self.b is not None:
            folded = torch.addmm(folded, exact(self.b).T, exact(self.a))
        return folded if self.dense is None else folded + exact(self.dense)

    def delta_norms(self, widths: Sequence[int]) -> torch.Tensor:
        """At most what is added to the weight of each member [width, in], as Frobenius norms.

        Shape: [members], on the terms' device. `scale` is left out.
        """
        assert not self.tiled
        norms = torch.zeros(len(widths))
        if self.a is not None and self.b is not None:
            # Of b^T a, without making it: tr((b b^T) (a a^T)).
            a, b = self.a.float(), self.b.float()
            inner = a @ a.T
            squares = [(part @ part.T * inner).sum() for part in b.split(list(widths), dim=1)]
            norms = torch.stack(squares).clamp(min=0).sqrt()
        if self.dense is not None:
            parts = self.dense.float().split(list(widths))
            dense = torch.stack([torch.linalg.matrix_norm(part) for part in parts])
            norms = norms.to(dense.device) + dense
        return norms

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of `fold`, in float32, up to rounding."""
        assert not self.tiled

        def exact(part: torch.Tensor) -> torch.Tensor:
            return part.to(weight.device, torch.float32)

        plain = exact(weight)
        if self.dense is not None:
            plain = plain - exact(self.dense)
        if self.a is not None and self.b is not None:
            plain = torch.addmm(plain, exact(self.b).T, exact(self.a), alpha=-1)
        return plain if self.scale is None else plain / (1 + exact(self.scale))[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class MemberTerms:
    """An adapter's terms on one group, its members still apart."""

    group: ProjectionGroup
    members: tuple[LinearTerms, ...]

    @property
    def shape(self) -> GroupShape:
        """Which terms there are: the signature entry of a slab that can hold them."""
        members = self.members
        return GroupShape(
            _padded(sum(m.a.shape[0] for m in members if m.a is not None)),
            scale=any(m.scale is not None for m in members),
            dense=any(m.dense is not None for m in members),
            bias=any(m.bias is not None for m in members),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the terms joined, in float32."""
        shape, group = self.shape, self.group
        values = shape.rank * (group.in_features + group.out_features)
        values += (shape.scale + shape.bias) * group.out_features
        values += shape.dense * group.in_features * group.out_features
        return values * torch.float32.itemsize

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a dtype holds all factors without loss."""
        factors = (part for one in self.members for part in (one.a, one.b))
        return all(part is None or _fits(part, dtype) for part in factors)

    def joined(self) -> GroupTerms:
        """The terms side by side, in float32."""
        shape, group = self.shape, self.group
        rank, width = shape.rank, group.out_features
        joined = GroupTerms(
            a=torch.empty(rank, group.in_features) if rank else None,
            b=torch.empty(rank, width) if rank else None,
            columns=torch.empty(rank, 2, dtype=torch.long) if rank else None,
            scale=torch.empty(width) if shape.scale else None,
            dense=torch.empty(width, group.in_features) if shape.dense else None,
            bias=torch.empty(width) if shape.bias else None,
        )
        self.write(joined)
        return joined

    def write(self, place: GroupTerms) -> None:
        """Join the terms where they are to lie, in the dtype of the place."""
        widths, members = self.group.widths, self.members
        self._write_factors(place)
        _put_side_by_side(place.scale, [m.scale for m in members], widths)
        _put_side_by_side(place.dense, [m.dense for m in members], widths)
        _put_side_by_side(place.bias, [m.bias for m in members], widths)

    def _write_factors(self, place: GroupTerms) -> None:
        if place.a is None or place.b is None:
            return
        if place.a.dtype is torch.uint8:
            self._write_bytes(place.a, place.b)
        elif place.tiled:
            self._write_tiles(place.a, place.b)
        else:
            self._write_rows(place.a, place.b)
        if place.columns is not None:
            place.columns.copy_(reach(self._spans(), place.a.shape[0]))

    def _spans(self) -> tuple[Span, ...]:
        ranks = tuple(0 if m.a is None else m.a.shape[0] for m in self.members)
        return spans(self.group.widths, ranks)

    def _write_rows(self, a: torch.Tensor, b: torch.Tensor) -> None:
        stop, width = 0, b.shape[1]
        for number, start, stop, column, end in self._spans():
            member = self.members[number]
            assert member.a is not None and member.b is not None
            a[start:stop] = member.a
            # Each place is written once: a slot's memory is in no cache.
            rows = b[start:stop]
            rows[:, column:end] = member.b.T
            if column:
                rows[:, :column].zero_()
            if end < width:
                rows[:, end:].zero_()
        if stop < a.shape[0]:
            a[stop:].zero_()
            b[stop:].zero_()

    def _write_tiles(self, a: torch.Tensor, b: torch.Tensor) -> None:
        rows_of_a, rows_of_b = torch.zeros_like(a), b.new_zeros(b.shape[1], len(b))
        for number, start, stop, column, end in self._spans():
            member = self.members[number]
            assert member.a is not None and member.b is not None
            rows_of_a[start:stop, : self.group.in_features] = member.a
            rows_of_b[column:end, start:stop] = member.b
        write_tiles(rows_of_a, rows_of_b, a, b)

    def _write_bytes(self, a: torch.Tensor, b: torch.Tensor) -> None:
        clear_bytes(a, b)
        for number, start, _, column, _ in self._spans():
            member = self.members[number]
            assert member.a is not None and member.b is not None
            write_bytes(member.a, member.b, a, b, rank=start, column=column)


def probe_shape(group: ProjectionGroup) -> GroupShape:
    """What an adapter of PROBE_RANK on every layer but the output head has on this group."""
    return GroupShape(0 if group.is_head else _padded(PROBE_RANK * len(group.paths)))


def foldable(terms: Mapping[str, LinearTerms]) -> bool:
    """Whether weights can hold some of it, and rows' base outputs be had back without loss."""
    parts = ((one.a, one.scale, one.dense) for one in terms.values())
    return any(part is not None for each in parts for part in each) and all(
        one.scale is None or bool(((1 + one.scale).abs() >= _SMALLEST_SCALE).all())
        for one in terms.values()
    )


def split_terms(
    groups: Sequence[ProjectionGroup], terms: Mapping[str, LinearTerms]
) -> list[MemberTerms]:
    """An adapter's terms by groups, not yet joined."""
    return [
        MemberTerms(group, tuple(terms.get(path, _NOTHING) for path in group.paths))
        for group in groups
    ]


def _fits(values: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def _padded(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def _put_side_by_side(
    place: torch.Tensor | None,
    parts: Sequence[torch.Tensor | None],
    widths: Sequence[int],
) -> None:
    """Write the members' parts below each other; zero where one is missing."""
    if place is None:
        return
    for part, rows in zip(parts, place.split(list(widths)), strict=True):
        if part is None:
            rows.zero_()
        else:
            rows.copy_(part)
