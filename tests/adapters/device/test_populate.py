import mmap
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from dynamic_lora_adapters.device.populate import populate, populate_soon, release

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is populated on Linux alone"
)
SIZE = 64 * 2**20


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def untouched() -> torch.Tensor:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32)


def test_memory_is_committed_before_anything_is_written() -> None:
    table = untouched()
    before = resident_bytes()
    if not populate([table[:0], table]):
        pytest.skip("this kernel cannot populate memory")
    assert resident_bytes() - before > 0.9 * SIZE
    assert not table.any()


def test_only_what_a_tensor_covers_is_committed() -> None:
    table = untouched().view(64, -1)
    before = resident_bytes()
    if not populate([table[:8, 100:]]):
        pytest.skip("this kernel cannot populate memory")
    assert SIZE / 9 < resident_bytes() - before < SIZE / 4


def test_what_a_tensor_covers_alone_is_given_back() -> None:
    table = untouched().fill_(1)
    committed = resident_bytes()
    middle = table[table.numel() // 4 + 1 : -1]
    if not release([middle, table[:1]]):
        pytest.skip("this system gives nothing back")
    assert committed - resident_bytes() > SIZE / 2
    assert bool(table[: table.numel() // 4 + 1].all()) and table[-1] == 1


def test_what_is_there_stays_while_it_is_populated() -> None:
    table = torch.arange(100_000.0)
    asked = threading.Event()

    def find() -> list[torch.Tensor]:
        asked.set()
        return [table[1:50_000], table[7::3]]

    populate_soon(find, delay_s=0.01)
    assert asked.wait(10)
    populate(find())
    assert torch.equal(table, torch.arange(100_000.0))


@pytest.mark.parametrize("given_up", [True, False])
def test_what_was_given_up_while_it_was_committed_is_given_back(
    given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[threading.Timer] = []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: timers.append(timer))
    table = untouched()
    before = resident_bytes()
    populate_soon(lambda: [table], given_up=lambda: given_up)
    timers[0].function()
    if not given_up and resident_bytes() == before:
        pytest.skip("this kernel cannot populate memory")
    assert (resident_bytes() - before > SIZE / 2) is not given_up


def test_a_process_that_has_no_more_threads_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[threading.Timer] = []

    def refuse(timer: threading.Timer) -> None:
        refused.append(timer)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    populate_soon(list)
    assert len(refused) == 1
