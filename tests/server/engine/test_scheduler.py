from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_server.engine.kv.space import ContiguousSpace
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.engine.sequence import Phase
from dynamic_lora_server.generation import FinishReason
from tests.support.engines import advance, make_sequence

TOKEN = 7


def make_scheduler(cells: int = 1000, running: int = 4, chunk: int = 8) -> Scheduler:
    return Scheduler(ContiguousSpace(cells), max_running=running, prefill_chunk=chunk)


def step(scheduler: Scheduler, token: int = TOKEN) -> list[tuple[int, int]]:
    """One step; (sequence id, tokens run) of each piece."""
    pieces = scheduler.schedule()
    summary = [(piece.sequence.id, piece.num_tokens) for piece in pieces]
    for piece in pieces:
        advance(scheduler, piece, *([token] if piece.samples else []))
    return summary


def test_prompts_are_run_in_pieces_beside_decoding() -> None:
    scheduler = make_scheduler()
    short, long = make_sequence([1] * 3), make_sequence([1] * 22)
    scheduler.add(short)
    scheduler.add(long)
    assert step(scheduler) == [(short.id, 3), (long.id, 5)]
    assert step(scheduler) == [(short.id, 1), (long.id, 8)]
    assert step(scheduler) == [(short.id, 1), (long.id, 8)]
    assert long.output_ids == []
    assert step(scheduler) == [(short.id, 1), (long.id, 1)]
    assert (len(short.output_ids), len(long.output_ids)) == (4, 1)


def test_a_long_prompt_holds_up_no_short_one() -> None:
    scheduler = make_scheduler()
    long, short, other = (make_sequence([1] * n) for n in (100, 3, 4))
    for sequence in (long, short, other):
        scheduler.add(sequence)
    assert step(scheduler) == [(long.id, 4), (short.id, 3), (other.id, 1)]
    assert step(scheduler) == [(short.id, 1), (long.id, 5), (other.id, 3)]
    assert step(scheduler) == [(short.id, 1), (other.id, 1), (long.id, 8)]


def test_prompts_have_their_tokens_however_many_decode() -> None:
    scheduler = make_scheduler(running=20, chunk=2)
    for _ in range(19):
        scheduler.add(make_sequence([1], max_new_tokens=20))
    for _ in range(10):
        step(scheduler)
    long = make_sequence([1] * 6)
    scheduler.add(long)
    for _ in range(3):
        assert step(scheduler)[-1] == (long.id, 2)
    assert len(long.output_ids) == 1


def test_the_prompt_that_came_first_is_not_starved() -> None:
    scheduler = make_scheduler(running=2)
    long = make_sequence([1] * 100)
    scheduler.add(long)
    num_steps = 0
    while not long.output_ids:
        if scheduler.num_running + scheduler.num_waiting < 2:
            scheduler.add(make_sequence([1] * 8, max_new_tokens=1))
        assert sum(num_tokens for _, num_tokens in step(scheduler)) == 8
        num_steps += 1
    assert num_steps == 25


def test_of_a_burst_of_like_prompts_one_is_done_after_the_other() -> None:
    scheduler = make_scheduler()
    first, second, third = (make_sequence([1] * 8) for _ in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    assert step(scheduler) == [(first.id, 8)]
    assert step(scheduler) == [(first.id, 1), (second.id, 8)]
    assert step(scheduler) == [(first.id, 1), (second.id, 1), (third.id, 8)]


def test_no_more_than_max_running_are_admitted() -> None:
    scheduler = make_scheduler(running=2)
    for _ in range(3):
        scheduler.add(make_sequence([1]))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    scheduler = make_scheduler(cells=30)
    scheduler.add(make_sequence([1] * 5))
    large, small = make_sequence([1] * 18), make_sequence([1])
    scheduler.add(large)
    scheduler.add(small)
    step(scheduler)
    assert large.phase is small.phase is Phase.WAITING


def test_sequences_end_by_length_stop_and_eos() -> None:
    endings: list[tuple[dict[str, Any], FinishReason | None]] = [
        ({"max_new_tokens": 1}, FinishReason.LENGTH),
        ({"stop_token_ids": (TOKEN,)}, FinishReason.STOP),
        ({"ignore_eos": False}, None),
    ]
    for params, reason in endings:
        scheduler = make_scheduler()
        sequence = make_sequence([1, 2], **params)
        scheduler.add(sequence)
        (piece,) = scheduler.schedule()
        assert advance(scheduler, piece, TOKEN) is reason
        assert (sequence.phase is Phase.ENDED) is (reason is not None)
    (piece,) = scheduler.schedule()
    assert advance(scheduler, piece, 1) is FinishReason.EOS


def test_ending_twice_is_harmless_wherever_the_sequence_is() -> None:
    scheduler = make_scheduler(running=1)
    running, waiting = make_sequence([1]), make_sequence([1])
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    for sequence in (running, waiting):
        assert scheduler.end(sequence)
        assert not scheduler.end(sequence)
    assert not scheduler.has_work
    scheduler.check_integrity()


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 8)), min_size=1, max_size=12),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_every_sequence_ends_and_no_step_is_over_budget(
    shapes: list[tuple[int, int]], chunk: int
) -> None:
    scheduler = make_scheduler(cells=60, running=3, chunk=chunk)
    sequences = [make_sequence([1] * n, max_new_tokens=m) for n, m in shapes]
    for sequence in sequences:
        scheduler.add(sequence)
    num_steps = 0
    while scheduler.has_work:
        summary = step(scheduler)
        assert summary
        assert sum(n for _, n in summary) <= chunk + 3 - 1
        scheduler.check_integrity()
        num_steps += 1
        assert num_steps < 2000
    assert [len(s.output_ids) for s in sequences] == [m for _, m in shapes]
