"""Sequences move together where what is free is scattered, and nobody's answer changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_server.engine.engine import FailedEvent
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.kv.prefix_cache import CellCopy
from dynamic_lora_server.engine.kv.space import Allocation, ContiguousSpace, Move
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.engine.sequence import Phase
from dynamic_lora_server.engine.startup.build import BuiltEngine
from tests.support.engines import advance, make_engine, make_sequence, random_prompt, run_all
from tests.support.models import tiny_llama
from tests.support.traffic import assert_same, requests, serve

CELL_BYTES = 512  # of the tiny model's KV entries


def regions(space: ContiguousSpace, *sizes: int) -> list[Allocation]:
    return [space.allocate(size) for size in sizes]


def test_gaps_with_least_between_them_are_joined() -> None:
    space = ContiguousSpace(100)
    first, _, third, _, fifth, _ = regions(space, 10, 30, 10, 5, 10, 35)
    for gone in (first, third, fifth):
        space.free(gone)
    assert not space.can_allocate(20)
    assert space.make_gap(20) == [Move(50, 40)]
    assert space.allocate(20).starts == (45,)
    assert space.make_gap(10) == []  # there is one
    assert space.make_gap(11) == []  # there is no more
    space.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_whatever_is_free_can_be_allocated(moves: list[tuple[bool, int]]) -> None:
    space = ContiguousSpace(64)
    held: dict[int, Allocation] = {}
    content: dict[int, int] = {}
    for number, (take, size) in enumerate(moves):
        if take and size <= space.num_free:
            by_start = {one.starts[0]: name for name, one in held.items()}
            for move in space.make_gap(size):
                name = by_start[move.source]
                length = held[name].num_cells
                assert move.target < move.source
                for cell in range(length):
                    content[move.target + cell] = content[move.source + cell]
                held[name] = Allocation((move.target,), length, length)
            held[number] = space.allocate(size)
            content |= dict.fromkeys(held[number].cells(0, size), number)
        elif not take and held:
            space.free(held.pop(list(held)[size % len(held)]))
        space.check_integrity()
        for name, one in held.items():
            assert {content[cell] for cell in one.cells(0, one.num_cells)} == {name}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=30),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_the_head_of_the_queue_waits_for_cells_alone(
    shapes: list[tuple[int, int]], chunk: int
) -> None:
    space = ContiguousSpace(60)
    scheduler = Scheduler(space, max_running=4, prefill_chunk=chunk)
    sequences = [make_sequence([1] * n, max_new_tokens=m) for n, m in shapes]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        pieces = scheduler.schedule()
        waiting = [one for one in sequences if one.phase is Phase.WAITING]
        if waiting and scheduler.num_running < 4:
            assert space.num_free < waiting[0].max_tokens
        for piece in pieces:
            advance(scheduler, piece, *([7] if piece.samples else []))
        scheduler.check_integrity()


@pytest.mark.parametrize(("source", "target"), [(10, 3), (3, 10), (3, 20)])
def test_runs_of_cells_that_overlap_are_copied_whole(source: int, target: int) -> None:
    layers = [LayerGeometry(2, 4, 4)]
    cache = KVCache(layers, num_cells=40, device=torch.device("cpu"), dtype=torch.float32)
    for table in (*cache.keys, *cache.values):
        table.copy_(torch.randn(table.shape))
    wanted = [table[source : source + 12].clone() for table in (*cache.keys, *cache.values)]
    cache.copy([CellCopy(source, target, 12)])
    for table, content in zip((*cache.keys, *cache.values), wanted, strict=True):
        assert torch.equal(table[target : target + 12], content)


@pytest.fixture(scope="module")
def narrow() -> BuiltEngine:
    """Room for two requests of middle length."""
    return make_engine(tiny_llama(), kv_memory=CELL_BYTES * 160, prefix_cache_memory=16 * 512)


@pytest.fixture(scope="module")
def wide() -> BuiltEngine:
    return make_engine(tiny_llama())


@pytest.fixture
def num_moved(narrow: BuiltEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many sequences moved, call by call."""
    counts: list[int] = []
    make_gap = ContiguousSpace.make_gap

    def counting(self: ContiguousSpace, num_tokens: int) -> list[Move]:
        moves = make_gap(self, num_tokens)
        counts.append(len(moves))
        return moves

    monkeypatch.setattr(ContiguousSpace, "make_gap", counting)
    yield counts
    assert narrow.space.num_free == narrow.space.num_cells


def test_answers_are_the_same_after_a_move(
    narrow: BuiltEngine, wide: BuiltEngine, num_moved: list[int]
) -> None:
    def run(built: BuiltEngine) -> list[list[int]]:
        shapes = [(20, 4), (40, 30), (20, 4), (30, 12), (50, 10)]
        return run_all(
            built,
            [
                make_sequence(random_prompt(n, seed=n + m), max_new_tokens=m, ignore_eos=True)
                for n, m in shapes
            ],
        )

    assert run(narrow) == run(wide)
    assert sum(num_moved) > 0


@given(wanted=st.lists(requests(), min_size=3, max_size=8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_everybody_gets_the_same(
    narrow: BuiltEngine,
    wide: BuiltEngine,
    folders: dict[str, Path],
    wanted: list[dict[str, Any]],
) -> None:
    assert_same(serve(narrow, wanted, folders), serve(wide, wanted, folders))


def test_who_was_to_move_in_a_broken_step_ends_with_it(
    narrow: BuiltEngine, num_moved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = narrow.engine
    first, second, third, large = (
        make_sequence(random_prompt(n, seed=n), max_new_tokens=m)
        for n, m in ((30, 1), (60, 1), (40, 1), (20, 20))
    )
    for one in (first, second, third):
        engine.add(one)
    engine.step()
    engine.step()
    assert first.phase is Phase.ENDED
    engine.add(large)

    def fail(_copies: object) -> None:
        raise RuntimeError("no memory for copies")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.cache, "copy", fail)
        events = engine.step()
    assert num_moved[-1] == 2
    assert all(isinstance(event, FailedEvent) for event in events)
    # The third had no piece in the step, but was to move.
    assert (second.num_computed, third.num_computed, large.num_computed) == (16, 18, 0)
    assert {event.sequence_id for event in events} == {second.id, third.id, large.id}
