"""Factors in eight bits: what they lose, and that products of them lose no more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.device.groups import GroupTerms, MemberTerms
from dynamic_lora_adapters.device.slab import Slab
from dynamic_lora_adapters.kernels import REFERENCE, SlotFactors
from dynamic_lora_adapters.kernels.byte_factors import rounded_to_bytes
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout, layout_for
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.segments import Effect, Run
from dynamic_lora_adapters.terms import LinearTerms
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
REASON = obstacle(ProductKind.W8A8, torch.ones(8, 8))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

members_of_any_size = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 90)), min_size=1, max_size=3
).filter(lambda members: any(rank for rank, _ in members))


def bytes_of(adapters: list[MemberTerms]) -> Slab:
    return slab_of(adapters, FactorLayout.BYTES, torch.uint8)


def both(terms: GroupTerms) -> tuple[torch.Tensor, torch.Tensor]:
    assert terms.a is not None and terms.b is not None
    return terms.a, terms.b


@given(members=members_of_any_size, in_features=st.integers(1, 150))
@settings(deadline=None)
def test_each_rank_is_rounded_to_multiples_of_a_scale_of_its_own(
    members: Members, in_features: int
) -> None:
    group = group_of(members, in_features)
    terms = random_terms(members, group)
    a, b = both(terms.joined())
    kept_a, kept_b = both(bytes_of([terms]).terms(0, 0).plain(group))
    rank = len(a)
    assert not kept_a[rank:].any() and not kept_b[rank:].any()
    for exact, kept, largest in ((b, kept_b[:rank], 127), (a, kept_a[:rank], None)):
        scale = exact.abs().amax(1, keepdim=True) / 127
        # Both scales of a rank are in its row of a.
        whole = kept if largest else kept / b.abs().amax(1, keepdim=True).clamp(min=1e-30) * 127
        off = whole * scale - exact if largest else whole - exact
        assert bool((off.abs() <= 0.501 * scale + 1e-12).all())
    assert bool((kept_b == kept_b.round()).all()) and float(kept_b.abs().max()) == 127


def test_what_a_check_reckons_with_is_what_a_slot_holds() -> None:
    group = group_of([(12, 60)], 100)
    terms = random_terms([(12, 60)], group)
    a, b = both(terms.joined())
    kept_a, kept_b = both(bytes_of([terms]).terms(0, 0).plain(group))
    rounded_a, rounded_b = rounded_to_bytes(a, b.T)
    # A number half way between two multiples may go to either.
    torch.testing.assert_close(kept_a.T @ kept_b, (rounded_b @ rounded_a).T, rtol=0, atol=0.02)


def test_ranks_of_zeros_stay_so() -> None:
    group = group_of([(3, 20)], 10)
    terms = MemberTerms(group, (LinearTerms(a=torch.zeros(3, 10), b=torch.ones(20, 3)),))
    kept_a, _ = both(bytes_of([terms]).terms(0, 0).plain(group))
    assert not kept_a.any()
    a, b = rounded_to_bytes(torch.zeros(3, 10), torch.zeros(20, 3))
    assert not a.any() and not b.any()


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    members=members_of_any_size,
    in_features=st.integers(1, 200),
    undone=st.booleans(),
    gap=st.integers(0, 5),
)
@settings(deadline=None)
def test_products_add_what_the_reference_does(
    lengths: list[int], members: Members, in_features: int, undone: bool, gap: int
) -> None:
    """But for what is rounded to eight bits: the inputs, and what they are shrunk to."""
    group = group_of(members, in_features)
    slab = bytes_of([random_terms(members, group) for _ in lengths])
    kept = [both(slab.terms(0, slot).plain(group)) for slot in range(len(lengths))]
    a, b = (torch.stack(factors) for factors in zip(*kept, strict=True))
    run = Run(slab, 0, 0, lengths, effect=Effect.UNDO if undone else Effect.APPLY)
    x = torch.randn(sum(lengths), in_features)
    wide = torch.randn(sum(lengths), group.out_features + gap)
    out = wide[:, : group.out_features]
    expected, behind = out.clone(), wide[:, group.out_features :].clone()
    REFERENCE(expected, x, SlotFactors(a, b), run)
    NativeSegments()(out, x, factors_of(slab, run), run)
    assert bool((((out - expected).abs()) <= most_lost(x, a, b) + 1e-5).all())
    assert torch.equal(wide[:, group.out_features :], behind)


def most_lost(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What rounding may take from an output at most, [1, out]."""
    step = float(x.abs().max()) / 127
    shrunk = (x.abs() @ a.abs().amax(0).T).amax(0) + step * a.abs().amax(0).sum(1)
    of_inputs = step / 2 * a.abs().amax(0).sum(1) @ b.abs().amax(0)
    of_shrunk = shrunk.max() / 127 / 2 * b.abs().amax(0).sum(0)
    return (of_inputs + of_shrunk)[None] * 1.01


@pytest.mark.parametrize("ranks", [(4, 4, 4), (8, 8, 8), (3, 1, 30)])
def test_members_lose_nothing_to_one_that_is_far_larger(ranks: tuple[int, ...]) -> None:
    """Of small ranks, several members share a tile."""
    widths = 40, 24, 24
    group = group_of(list(zip(ranks, widths, strict=True)), 96)
    terms = random_terms(list(zip(ranks, widths, strict=True)), group)
    large, *others = terms.members
    assert large.b is not None
    terms = MemberTerms(group, (LinearTerms(a=large.a, b=large.b * 1e5), *others))
    slab = bytes_of([terms])
    a, b = both(terms.joined())
    x = torch.randn(30, 96)
    out, expected = torch.zeros(30, 88), x @ a.T @ b
    run = Run(slab, 0, 0, [30])
    NativeSegments()(out, x, factors_of(slab, run), run)
    for got, wanted in zip(out.split(widths, 1), expected.split(widths, 1), strict=True):
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 0.03


def test_columns_that_are_not_known_may_be_anywhere() -> None:
    group = group_of([(8, 40)], 48)
    known, unknown = with_and_without_columns(bytes_of([random_terms([(8, 40)], group)]))
    assert torch.equal(known, unknown) and bool(known.any())


def test_they_lie_in_bytes_wherever_they_are_in_eight_bits() -> None:
    assert layout_for(CPU, torch.uint8) is FactorLayout.BYTES


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.uint8, FactorLayout.SPREAD), (torch.bfloat16, FactorLayout.BYTES)],
    ids=str,
)
def test_nothing_else_is_laid_out_so(dtype: torch.dtype, layout: FactorLayout) -> None:
    with pytest.raises(AssertionError):
        layout_of(group_of([(8, 16)], 32), layout, dtype)


def test_whole_tiles_are_counted() -> None:
    group = group_of([(5, 17)], 33)
    slab = bytes_of([random_terms([(5, 17)], group)])
    assert slab.num_bytes == 16 * (36 + 4 + 32)
