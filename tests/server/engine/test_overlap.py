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
from dynamic_lora_server.engine.build import BuiltEngine
from dynamic_lora_server.engine.engine import EngineEvent, FailedEvent, TokenEvent
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.sequence import Phase, Sequence
from dynamic_lora_server.engine.worker import Cancel, Stop, Submit, Worker
from dynamic_lora_server.generation import FinishReason
from dynamic_lora_server.modes import Mode
from tests.support.engines import admit, make_engine, make_sequence, random_prompt, run_all
from tests.support.models import VOCAB_SIZE, tiny_llama

TASKS = [None, "all", "attention"]
EVERYTHING = tuple(range(VOCAB_SIZE))
# One in five, so that some sequences end early.
STOPS = EVERYTHING[::5]


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


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """What one request asks for, and the step at which it comes."""
    params: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(1, 8)),
        "stop_token_ids": draw(st.sampled_from([(), STOPS])),
        "logprobs": draw(st.booleans()),
        "top_logprobs": draw(st.integers(0, 3)),
    }
    if draw(st.booleans()):
        params |= {
            "temperature": draw(st.sampled_from([0.7, 3.0])),
            "seed": draw(st.integers(0, 9)),
        }
    if draw(st.sampled_from([False, False, True])):
        params |= {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    return {
        "at": draw(st.integers(0, 6)),
        "task": draw(st.sampled_from(TASKS)),
        "shared": draw(st.booleans()),
        "length": draw(st.integers(1, 70)),
        "params": params,
    }


def serve(
    built: BuiltEngine, wanted: list[dict[str, Any]], folders: dict[str, Path]
) -> list[list[TokenEvent]]:
    """Every request's events; requests come at their steps."""
    sequences: list[Sequence] = []
    for number, one in enumerate(wanted):
        # Half of the prompts begin alike, so that prefixes are found.
        seed = 0 if one["shared"] else number + 1
        adapter = None if one["task"] is None else admit(built, folders[one["task"]])
        prompt = random_prompt(70, seed=seed)[: one["length"]]
        sequences.append(make_sequence(prompt, adapter=adapter, **one["params"]))
    found: dict[int, list[TokenEvent]] = {one.id: [] for one in sequences}
    step = 0
    while step <= 6 or built.engine.has_work:
        for one, sequence in zip(wanted, sequences, strict=True):
            if one["at"] == step:
                built.engine.add(sequence)
        for event in built.engine.step():
            assert isinstance(event, TokenEvent), event
            found[event.sequence_id].append(event)
        step += 1
    built.engine.scheduler.check_integrity()
    for sequence in sequences:
        assert [e.sampled.token_id for e in found[sequence.id]] == sequence.output_ids
        assert (sequence.num_unread, sequence.phase) == (0, Phase.ENDED) or sequence.num_unread == 1
        if sequence.adapter is not None:
            built.pool.release(sequence.adapter)
    return [found[one.id] for one in sequences]


@given(wanted=st.lists(requests(), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_gets_the_same(
    engines: list[BuiltEngine], folders: dict[str, Path], wanted: list[dict[str, Any]]
) -> None:
    one_by_one, overlapping = (serve(built, wanted, folders) for built in engines)
    for expected, actual in zip(one_by_one, overlapping, strict=True):
        assert [(e.sampled.token_id, e.reason) for e in actual] == [
            (e.sampled.token_id, e.reason) for e in expected
        ]
        for found, wished in zip(actual, expected, strict=True):
            assert found.sampled.logprob == pytest.approx(wished.sampled.logprob, abs=1e-4)
            assert [token for token, _ in found.sampled.top] == [
                token for token, _ in wished.sampled.top
            ]


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
    message = "ArithmeticError: its logits are no finite numbers"
    assert events == [FailedEvent(broken.id, message)]
    expected = run_all(make_engine(tiny_llama(), native=False), [make_sequence([5, 6, 7])])
    assert [fine.output_ids] == expected


def breaking(at: int) -> Callable[..., Any]:
    """`ModelRunner.run`, but that the call of this number raises."""
    run, calls = ModelRunner.run, iter(range(1000))

    def replaced(self: ModelRunner, *args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise MemoryError("no room for the step")
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


def test_what_is_on_its_way_at_the_stop_is_delivered() -> None:
    events: list[EngineEvent] = []
    worker = Worker(make_engine(tiny_llama(), overlap=True).engine, events.extend)
    last = make_sequence(random_prompt(5, seed=0), max_new_tokens=1)
    step = worker._engine.step

    def stopping() -> list[EngineEvent]:
        worker.send(Stop())
        return step()

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
