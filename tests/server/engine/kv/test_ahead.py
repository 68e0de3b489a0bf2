"""Memory that is committed before prefixes come to it."""

import mmap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from dynamic_lora_adapters.arena import HUGE_PAGE_BYTES, Arena
from dynamic_lora_adapters.device.populate import populate
from dynamic_lora_server.engine.kv import ahead
from dynamic_lora_server.engine.kv.ahead import CommittedAhead
from tests.support.eventually import wait_until

PER_CELL = 2048
TOGETHER = HUGE_PAGE_BYTES // PER_CELL


def make_tables(number: int, num_pages: int) -> list[torch.Tensor]:
    arena = Arena()
    sizes = num_pages * TOGETHER, PER_CELL
    return [arena.empty(*sizes, dtype=torch.uint8) for _ in range(number)]


def committed(tables: Sequence[torch.Tensor]) -> list[int]:
    """Huge pages of each table that the system holds in memory, from what it says of our pages."""
    found = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for table in tables:
            pagemap.seek(table.data_ptr() // mmap.PAGESIZE * 8)
            entries = pagemap.read(table.nbytes // mmap.PAGESIZE * 8)
            present = sum(entry >> 7 for entry in entries[7::8]) * mmap.PAGESIZE
            found.append(present // HUGE_PAGE_BYTES)  # the first page alone is there at once
    return found


def test_a_page_of_each_table_is_committed_behind_what_is_used() -> None:
    tables = make_tables(2, num_pages=4)
    if not (populate(make_tables(1, num_pages=1)) and Path("/proc/self/pagemap").exists()):
        pytest.skip("the system cannot be asked to")

    def reached(expected: list[int]) -> bool:
        return committed(tables) == expected

    following = CommittedAhead(tables, range(TOGETHER, 4 * TOGETHER))
    assert committed(tables) == [0, 0]
    for used, pages in [(TOGETHER, 1), (TOGETHER + 1, 2), (2 * TOGETHER, 2), (3 * TOGETHER, 3)]:
        following.use(used)
        wait_until(partial(reached, [pages, pages]), f"{pages} pages")


def test_cells_that_fit_into_a_page_are_left_to_who_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[object] = []
    monkeypatch.setattr(ahead, "populate_soon", lambda *args, **_: begun.append(args))
    tables = make_tables(1, num_pages=2)
    CommittedAhead(tables, range(TOGETHER)).use(0)
    CommittedAhead([], range(0)).use(0)
    CommittedAhead([], range(2 * TOGETHER)).use(0)
    assert not begun
    CommittedAhead(tables, range(2 * TOGETHER)).use(0)
    assert begun
