"""Who leaves for an adapter that has no room: the same as a slow search says, found in one pass."""

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from types import FrameType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.device.eviction import Wanted, order_of_claim
from dynamic_lora_adapters.device.groups import GroupShape, ProjectionGroup
from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
from dynamic_lora_adapters.device.slab_layout import SlabKind, SlabLayout
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout

LAYOUT = SlabLayout(
    [ProjectionGroup(("q",), 16, (16,))],
    device=torch.device("cpu"),
    dtype=torch.float32,
    factor_dtype=torch.float32,
    layout=FactorLayout.ROWS,
    num_slots=4,
)
RANKS = (8, 16, 24)


def kind_of(rank: int) -> SlabKind:
    return SlabKind((GroupShape(rank),), LAYOUT)


UNIT = kind_of(8).slot_bytes


def slab_of(number: int, rank: int, num_tenants: int, num_slots: int) -> Slab:
    slab = Slab(
        number=number,
        signature=(GroupShape(rank),),
        a=[],
        b=[],
        num_bytes=kind_of(rank).slot_bytes * num_slots,
        tenants=[None] * num_slots,
    )
    for slot in range(num_tenants):
        slab.tenants[slot] = ResidentAdapter(f"{number}/{slot}", slab, slot)
    return slab


def tenants_of(slabs: Sequence[Slab]) -> list[ResidentAdapter]:
    return [tenant for slab in slabs for tenant in slab.tenants if tenant is not None]


def slowly_found(wanted: Wanted, idle: Sequence[ResidentAdapter]) -> list[ResidentAdapter]:
    """The choice as it is defined: every subset is weighed as a whole."""
    if not found_without(wanted, idle):
        return []
    lengths = range(1, len(idle) + 1)
    needed = bisect_left(lengths, True, key=lambda n: found_without(wanted, idle[:n])) + 1
    gone = Counter(one.slab.number for one in idle[:needed])
    victims = [
        one
        for one in idle[:needed]
        if one.slab.num_taken == gone[one.slab.number]
        or one.own_bytes > 0
        or wanted.kind.includes(one.slab)
    ]
    for adapter in victims[-2::-1]:
        fewer = [one for one in victims if one is not adapter]
        if found_without(wanted, fewer):
            victims = fewer
    return victims


def found_without(wanted: Wanted, victims: Sequence[ResidentAdapter]) -> bool:
    free, has_slot = wanted.free_bytes, wanted.has_slot
    free += sum(one.own_bytes for one in victims)
    gone = Counter(one.slab.number for one in victims)
    for slab in {one.slab.number: one.slab for one in victims}.values():
        if slab.num_taken == gone[slab.number]:
            free += slab.num_bytes
        else:
            has_slot |= wanted.kind.includes(slab)
    return free >= 0 and (has_slot or wanted.kind.num_slots_for(free) >= 1)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Wanted, list[ResidentAdapter]]:
    """Some slabs, in any order of use the adapters in them that may go, and what is wanted."""
    slabs = []
    for number in range(draw(st.integers(1, 6))):
        num_slots = draw(st.integers(1, 4))
        num_tenants = draw(st.integers(1, num_slots))
        slabs.append(slab_of(number, draw(st.sampled_from(RANKS)), num_tenants, num_slots))
    tenants = draw(st.permutations(tenants_of(slabs)))
    for tenant in tenants:
        tenant.own_bytes = draw(st.sampled_from((0, 0, 0, 100, UNIT)))
    idle = tenants[: draw(st.integers(0, len(tenants)))]
    free = draw(st.integers(-6 * UNIT, UNIT - 1))
    kind, has_slot = kind_of(draw(st.sampled_from(RANKS))), draw(st.booleans())
    # Who finds room at once asks nobody to leave.
    return Wanted(kind, free, has_slot and free < 0), idle


@given(pools())
@settings(max_examples=500, deadline=None)
def test_the_choice_is_that_of_the_slow_search(
    pool: tuple[Wanted, list[ResidentAdapter]],
) -> None:
    wanted, idle = pool
    assert wanted.victims(idle) == slowly_found(wanted, idle)


def num_calls(num_slabs: int) -> int:
    """Python frames that are entered to find out that all of so many slabs' adapters must go."""
    slabs = [slab_of(number, 8, 4, 4) for number in range(num_slabs)]
    idle, calls = tenants_of(slabs), 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    wanted = Wanted(kind_of(16), 16 * UNIT - 4 * num_slabs * UNIT, False)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        victims = wanted.victims(idle)
    finally:
        sys.setprofile(before)
    assert len(victims) == len(idle) - 12
    return calls


def test_the_work_grows_with_the_number_of_adapters() -> None:
    """The pool is locked meanwhile, and requests of other adapters wait."""
    assert num_calls(200) < 2.5 * num_calls(100)


@pytest.mark.parametrize(("held", "claimed"), [((), {"1/0", "2/0"}), (("3/0",), {"1/0", "3/0"})])
def test_a_claim_takes_who_leaves_anyway_then_what_is_held_then_what_is_idle(
    held: tuple[str, ...], claimed: set[str]
) -> None:
    tenants = tenants_of([slab_of(number, 8, 1, 1) for number in range(4)])
    for used, tenant in enumerate(tenants):
        tenant.last_used = used
    tenants[1].doomed = True
    order = order_of_claim(tenants, held=held, idle=tenants[2:3])
    assert {one.digest for one in Wanted(kind_of(16), 0, False).victims(order)} == claimed
