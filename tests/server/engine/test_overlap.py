"""Steps that are started before the one before is read give what steps one by one give."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.engine.engine import EngineEvent, FailedEvent, TokenEvent
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.engine.worker import Cancel, Stop, Submit, Worker
from dynamic_lora_server.generation import FinishReason
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.noop import noop
from tests.support.engines import admit, make_engine, make_sequence, random_prompt, run_all
from tests.support.models import VOCAB_SIZE, tiny_llama
from tests.support.traffic import assert_same, requests, serve

EVERYTHING = tuple(range(VOCAB_SIZE))


def pair(**options: Any) -> list[BuiltEngine]:
    """Two engines around the same weights: steps one by one, and overlapping."""
    return [make_engine(tiny_llama(), overlap=overlap, **options) for overlap in (False, True)]


@pytest.fixture(scope="module", params=["contiguous", "paged", "merged"])
def engines(request: pytest.FixtureRequest) -> list[BuiltEngine]:
    if request.param == "merged":
        return pair(mode=Mode.MERGED)
    return pair(paged=request.param == "paged", mode=Mode.BYPASS)


def steps(built: BuiltEngine, number: int) -> list[EngineEvent]:
    return [event for _ in range(number) for event in built.engine.step()]


@given(wanted=st.lists(requests(), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_gets_the_same(
    engines: list[BuiltEngine], folders: dict[str, Path], wanted: list[dict[str, Any]]
) -> None:
    one_by_one, overlapping = (serve(built, wanted, folders) for built in engines)
    assert_same(overlapping, one_by_one)


def test_a_step_is_started_before_the_one_before_is_read() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    sequence = make_sequence(random_prompt(5, seed=0), max_new_tokens=3)
    built.engine.add(sequence)
    assert built.engine.step() == []
    assert (sequence.num_unread, sequence.output_ids) == (1, [])
    (first,) = built.engine.step()
    # Its second token is being computed from the first, which the host has only now.
    assert (sequence.num_unread, sequence.num_computed) == (1, 6)
    assert isinstance(first, TokenEvent)
    assert sequence.output_ids == [first.sampled.token_id]


def test_penalties_take_the_token_that_is_not_read_yet() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    params: dict[str, Any] = {
        "repetition_penalty": 1.8,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
    }
    prompt = random_prompt(5, seed=0)
    expected = run_all(make_engine(tiny_llama()), [make_sequence(prompt, **params)])
    assert run_all(built, [make_sequence(prompt, **params)]) == expected
    assert built.engine.num_overlapped == built.engine.num_steps - 1


def test_nothing_is_started_for_a_sequence_at_its_longest() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    run_all(built, [make_sequence(random_prompt(5, seed=0), max_new_tokens=3)])
    assert built.engine.num_steps == 3


def test_the_row_behind_the_last_token_is_told_to_nobody() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    sequence = make_sequence(random_prompt(5, seed=0), stop_token_ids=EVERYTHING)
    built.engine.add(sequence)
    events = steps(built, 4)
    assert [e.reason for e in events if isinstance(e, TokenEvent)] == [FinishReason.STOP]
    assert len(sequence.output_ids) == 1
    assert sequence.num_run == 5
    assert built.engine.num_steps == 2
    assert not built.engine.has_work
    built.engine.scheduler.check_integrity()


def test_the_row_behind_the_last_token_does_not_count_as_served(folders: dict[str, Path]) -> None:
    built = make_engine(tiny_llama(), overlap=True, mode=Mode.MERGED)
    adapter = admit(built, folders["all"])
    sequence = make_sequence(random_prompt(5, seed=0), adapter=adapter, stop_token_ids=EVERYTHING)
    run_all(built, [sequence])
    assert (sequence.num_merged, sequence.num_run) == (5, 5)


def test_a_sequence_that_is_cancelled_on_its_way_says_nothing_more() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    gone, other = (make_sequence(random_prompt(5, seed=seed)) for seed in range(2))
    alone = run_all(make_engine(tiny_llama()), [make_sequence(random_prompt(5, seed=1))])
    built.engine.add(gone)
    built.engine.add(other)
    steps(built, 3)
    built.engine.cancel(gone)
    events = steps(built, 20)
    assert {event.sequence_id for event in events} == {other.id}
    assert [other.output_ids] == alone
    assert not built.engine.has_work


def test_when_all_are_cancelled_the_step_on_its_way_is_still_ended() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    sequence = make_sequence(random_prompt(5, seed=0))
    built.engine.add(sequence)
    built.engine.step()
    built.engine.cancel(sequence)
    assert built.engine.has_work
    assert built.engine.step() == []
    assert not built.engine.has_work


def test_logits_that_are_no_numbers_end_their_sequence_alone() -> None:
    built = make_engine(tiny_llama(), overlap=True, native=False)
    huge = LinearTerms(a=torch.full((4, 64), 1e30), b=torch.full((64, 4), 1e30))
    path = "model.layers.0.self_attn.o_proj"
    adapter = built.pool.admit("huge", AdapterTerms(linears={path: huge}))
    broken = make_sequence([5, 6, 7], adapter=adapter)
    fine = make_sequence([5, 6, 7])
    built.engine.add(broken)
    built.engine.add(fine)
    events = [event for event in steps(built, 12) if isinstance(event, FailedEvent)]
    message = "its logits are no finite numbers"
    assert events == [FailedEvent(broken.id, message)]
    expected = run_all(make_engine(tiny_llama(), native=False), [make_sequence([5, 6, 7])])
    assert [fine.output_ids] == expected


def breaking(at: int, error: Exception | None = None) -> Callable[..., Any]:
    """`ModelRunner.run`, but that the call of this number raises."""
    run, calls = ModelRunner.run, iter(range(1000))

    def replaced(self: ModelRunner, *args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise error or MemoryError("no room for the step")
        return run(self, *args, **options)

    return replaced


def test_a_step_that_cannot_be_started_ends_its_own_after_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = make_engine(tiny_llama(), overlap=True)
    short = make_sequence(random_prompt(5, seed=0), max_new_tokens=3)
    long = make_sequence(random_prompt(6, seed=1), max_new_tokens=9)
    (expected,) = run_all(
        make_engine(tiny_llama()), [make_sequence(random_prompt(5, seed=0), max_new_tokens=3)]
    )
    with monkeypatch.context() as patched:
        patched.setattr(ModelRunner, "run", breaking(at=3))
        built.engine.add(short)
        built.engine.add(long)
        steps(built, 3)
        *tokens, failed = built.engine.step()
    # The third tokens were on their way when the fourth step broke.
    assert [event.sequence_id for event in tokens] == [short.id, long.id]
    assert failed == FailedEvent(long.id, "MemoryError: no room for the step")
    assert (short.output_ids, len(long.output_ids)) == (expected, 3)
    assert not built.engine.has_work
    assert len(run_all(built, [make_sequence([1, 2, 3])])[0]) == 10


LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_device_that_is_lost_stops_the_engine(
    monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    engine = make_engine(tiny_llama(), overlap=overlap).engine
    events: list[EngineEvent] = []
    monkeypatch.setattr(ModelRunner, "run", breaking(1, LOST))
    worker = Worker(engine, events.extend)
    sequence = make_sequence(random_prompt(5, seed=0))
    worker.send(Submit(sequence))
    worker.start()
    while worker.alive:
        pass
    worker.stop()
    why = f"the engine has stopped: AcceleratorError: {LOST}"
    assert worker.failure == why
    assert events[-1] == FailedEvent(sequence.id, why)


def test_a_device_that_is_lost_on_the_way_stops_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost() -> None:
        raise LOST

    monkeypatch.setattr("dynamic_lora_server.engine.engine.milestone", lambda _: lost)
    engine = make_engine(tiny_llama(), overlap=True).engine
    engine.add(make_sequence(random_prompt(5, seed=0)))
    assert engine.step() == []
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        engine.step()


def test_what_is_on_its_way_at_the_stop_is_delivered() -> None:
    events: list[EngineEvent] = []
    worker = Worker(make_engine(tiny_llama(), overlap=True).engine, events.extend)
    last = make_sequence(random_prompt(5, seed=0), max_new_tokens=1)
    step = worker._engine.step

    def stopping(before_compute: Callable[[], object] = noop) -> list[EngineEvent]:
        worker.send(Stop())
        return step(before_compute)

    worker._engine.step = stopping  # type: ignore[method-assign]
    worker.send(Submit(last))
    worker.start()
    worker.stop()
    (event,) = events
    assert isinstance(event, TokenEvent)
    assert event.reason is FinishReason.LENGTH
    assert not worker._engine.has_work


def test_the_worker_lets_everybody_go(folders: dict[str, Path]) -> None:
    left: list[int] = []
    ended: list[int] = []

    def sink(events: list[EngineEvent]) -> None:
        ended.extend(
            event.sequence_id for event in events if isinstance(event, TokenEvent) and event.reason
        )

    built = make_engine(tiny_llama(), overlap=True)
    worker = Worker(built.engine, sink)
    sequences = [
        make_sequence(random_prompt(5, seed=n), adapter=admit(built, folders["all"]))
        for n in range(4)
    ]
    for sequence in sequences:
        worker.send(Submit(sequence, partial(left.append, sequence.id)))
    worker.start()
    worker.send(Cancel(sequences[0]))
    while len(left) < 4:
        assert worker.alive
    worker.stop()
    assert sorted(left) == [one.id for one in sequences]
    assert set(ended) >= {one.id for one in sequences[1:]}
    assert not built.engine.has_work
