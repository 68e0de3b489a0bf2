from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_server.engine.kv.space import Allocation, ContiguousSpace, KVSpace, PagedSpace

SPACES: dict[str, Callable[[], KVSpace]] = {
    "contiguous": lambda: ContiguousSpace(64),
    "paged": lambda: PagedSpace(8, 8),
}


@pytest.mark.parametrize("name", SPACES)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 70)), max_size=80))
@settings(max_examples=80, deadline=None)
def test_no_cell_is_held_twice_or_lost(name: str, moves: list[tuple[bool, int]]) -> None:
    space = SPACES[name]()
    held: list[Allocation] = []
    for take, size in moves:
        if take and space.can_allocate(size):
            held.append(space.allocate(size))
        elif not take and held:
            space.free(held.pop(size % len(held)))
        space.check_integrity()
        cells = [cell for a in held for cell in a.cells(0, a.num_cells)]
        assert len(cells) == len(set(cells))
        assert all(0 <= cell < space.num_cells for cell in cells)
    for allocation in held:
        space.free(allocation)
    assert space.num_free == space.num_cells
    space.check_integrity()


@pytest.mark.parametrize("name", SPACES)
def test_can_allocate_tells_the_truth_and_changes_nothing(name: str) -> None:
    space = SPACES[name]()
    assert space.can_allocate(64)
    assert not space.can_allocate(65)
    assert space.num_free == 64
    space.allocate(60)
    assert not space.can_allocate(10)
    with pytest.raises(RuntimeError, match="ask can_allocate first"):
        space.allocate(10)


def test_contiguous_regions_join_when_freed() -> None:
    space = ContiguousSpace(30)
    first, second, third = (space.allocate(10) for _ in range(3))
    space.free(first)
    space.free(third)
    assert not space.can_allocate(11)
    space.free(second)
    assert space.can_allocate(30)


def test_pages_scatter_positions() -> None:
    space = PagedSpace(4, 4)
    first, second = space.allocate(4), space.allocate(4)
    space.free(first)
    third = space.allocate(7)
    assert len(third.starts) == 2
    assert set(third.cells(0, 7)).isdisjoint(second.cells(0, 4))
    assert third.cell(5) == third.starts[1] + 1


def test_a_leak_is_reported() -> None:
    space = PagedSpace(2, 4)
    space._free.pop()
    with pytest.raises(RuntimeError, match="lost or held twice"):
        space.check_integrity()
    contiguous = ContiguousSpace(8)
    contiguous._gaps = [(0, 7)]
    with pytest.raises(RuntimeError, match="1 cells are lost"):
        contiguous.check_integrity()
