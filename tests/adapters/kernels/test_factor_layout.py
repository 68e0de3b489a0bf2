"""Factors in tiles: what is written is what is read, by the host and by the matrix unit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.device.groups import GroupTerms, MemberTerms, ProjectionGroup
from dynamic_lora_adapters.device.slab import Slab
from dynamic_lora_adapters.kernels import REFERENCE, SlotFactors
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout, layout_for
from dynamic_lora_adapters.kernels.native_segments import NativeSegments, reads_tiles
from dynamic_lora_adapters.segments import Effect, Run
from tests.support.factor_tables import (
    Members,
    factors_of,
    group_of,
    layout_of,
    random_terms,
    slab_of,
    with_and_without_columns,
)

CPU = torch.device("cpu")
needs_unit = pytest.mark.skipif(not reads_tiles(), reason="this processor has no matrix unit (AMX)")
members_of_any_size = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 90)), min_size=1, max_size=3
)


def tables_of(adapters: list[MemberTerms], layout: FactorLayout) -> Slab:
    return slab_of(adapters, layout, torch.bfloat16)


def exact_terms(members: Members, group: ProjectionGroup) -> MemberTerms:
    return random_terms(members, group, torch.bfloat16)


@given(members=members_of_any_size, in_features=st.integers(1, 70))
@settings(deadline=None)
def test_tiles_give_back_what_was_written(members: Members, in_features: int) -> None:
    group = group_of(members, in_features)
    terms = exact_terms(members, group)
    tiles, rows = (
        tables_of([terms], layout).terms(0, 0).plain(group)
        for layout in (FactorLayout.TILES, FactorLayout.ROWS)
    )
    assert isinstance(tiles, GroupTerms)
    assert (tiles.a is None) == (rows.a is None) == (terms.shape.rank == 0)
    for kept, expected in rows.parts(tiles):
        assert torch.equal(kept, expected)


@needs_unit
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    members=members_of_any_size.filter(lambda members: any(rank for rank, _ in members)),
    in_features=st.integers(1, 200),
    undone=st.booleans(),
    gap=st.integers(0, 5),
)
@settings(deadline=None)
def test_the_matrix_unit_adds_what_the_reference_does(
    lengths: list[int], members: Members, in_features: int, undone: bool, gap: int
) -> None:
    """But for what is rounded to bfloat16: the inputs, here exact, and what they are shrunk to."""
    group = group_of(members, in_features)
    slab = tables_of([exact_terms(members, group) for _ in lengths], FactorLayout.TILES)
    plain = [slab.terms(0, slot).plain(group) for slot in range(len(lengths))]
    run = Run(slab, 0, 0, lengths, effect=Effect.UNDO if undone else Effect.APPLY)
    x = torch.randn(sum(lengths), in_features).bfloat16().float()
    wide = torch.randn(sum(lengths), group.out_features + gap)
    out = wide[:, : group.out_features]
    expected, behind = out.clone(), wide[:, group.out_features :].clone()
    a = torch.stack([terms.a for terms in plain if terms.a is not None]).float()
    b = torch.stack([terms.b for terms in plain if terms.b is not None]).float()
    REFERENCE(expected, x, SlotFactors(a, b), run)
    NativeSegments()(out, x, factors_of(slab, run), run)
    largest = (x.abs() @ a.abs().amax(0).T @ b.abs().amax(0)).amax()
    torch.testing.assert_close(out, expected, rtol=0, atol=float(2**-8 * largest) + 1e-5)
    assert torch.equal(wide[:, group.out_features :], behind)


@needs_unit
def test_columns_that_are_not_known_may_be_anywhere() -> None:
    group = group_of([(8, 40)], 48)
    slab = tables_of([exact_terms([(8, 40)], group)], FactorLayout.TILES)
    known, unknown = with_and_without_columns(slab)
    assert torch.equal(known, unknown) and bool(known.any())


def test_factors_lie_as_what_reads_them_wants_them() -> None:
    assert layout_for(torch.device("cuda"), None) is FactorLayout.ROWS
    assert layout_for(CPU, None) is FactorLayout.SPREAD
    rounded = FactorLayout.TILES if reads_tiles() else FactorLayout.SPREAD
    assert layout_for(CPU, torch.bfloat16) is rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_are_of_bfloat16_alone(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        layout_of(group_of([(8, 16)], 32), FactorLayout.TILES, dtype)


def test_whole_tiles_are_counted() -> None:
    group = group_of([(5, 17)], 33)
    slab = tables_of([exact_terms([(5, 17)], group)], FactorLayout.TILES)
    assert slab.num_bytes == 8 * (64 + 32) * 2
