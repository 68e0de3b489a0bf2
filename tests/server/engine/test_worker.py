"""The engine thread's mailbox."""

import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_adapters.apply.merge import Merger
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_server.engine.engine import Engine, EngineEvent, FailedEvent, TokenEvent
from dynamic_lora_server.engine.kv.prefix_cache import CellCopy
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.scheduler import Piece
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.worker import Cancel, Stop, Submit, Worker
from dynamic_lora_server.modes import Mode
from tests.support.engines import admit, make_engine, make_sequence, random_prompt
from tests.support.eventually import wait_until
from tests.support.models import tiny_llama


def run(*messages: Submit | Cancel | Stop) -> list[EngineEvent]:
    """What comes of messages that all lie there when the thread begins; the last ends it."""
    events: list[EngineEvent] = []
    worker = Worker(make_engine(tiny_llama()).engine, events.extend)
    for message in messages:
        worker.send(message)
    worker.start()
    worker.stop()
    assert not worker.alive
    return events


def cancel_in_the_first_step(engine: Engine, worker: Worker, sequence: Sequence) -> None:
    """So that it is read when that step's events wait for the next."""
    schedule = engine.scheduler.schedule

    def cancelling() -> list[Piece]:
        if not engine.num_steps:
            worker.send(Cancel(sequence))
        return schedule()

    engine.scheduler.schedule = cancelling  # type: ignore[method-assign]


def test_a_submission_behind_the_stop_fails_by_name_and_is_let_go() -> None:
    left: list[str] = []
    sequence = make_sequence([1, 2, 3], max_new_tokens=3)
    events = run(Stop(), Submit(sequence, lambda: left.append("left")))
    assert events == [FailedEvent(sequence.id, "the server is shutting down")]
    assert left == ["left"]


def test_a_cancelled_sequence_is_let_go_once_and_says_nothing() -> None:
    left: list[str] = []
    sequence = make_sequence([1, 2, 3], max_new_tokens=3)
    submit = Submit(sequence, lambda: left.append("left"))
    assert run(submit, Cancel(sequence), Cancel(sequence)) == []
    assert left == ["left"]


def test_a_finished_sequence_is_let_go_before_its_end_is_told() -> None:
    order: list[str] = []

    def sink(events: list[EngineEvent]) -> None:
        tokens = [one for one in events if isinstance(one, TokenEvent)]
        order.extend("end" if one.reason else "token" for one in tokens)

    worker = Worker(make_engine(tiny_llama()).engine, sink)
    sequence = make_sequence([1, 2, 3], max_new_tokens=3)
    worker.send(Submit(sequence, lambda: order.append("left")))
    worker.start()
    wait_until(lambda: "end" in order, "the sequence ends")
    worker.stop()
    assert order == ["token", "token", "left", "end"]


@pytest.mark.parametrize("native", [True, False])
def test_tokens_are_told_when_the_next_step_is_being_computed(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def sink(events: list[EngineEvent]) -> None:
        order.extend("token" for _ in events)

    run = ModelRunner.run

    def running(self: ModelRunner, *args: Any, **options: Any) -> Any:
        order.append("begins")
        found = run(self, *args, **options)
        order.append("ends")
        return found

    monkeypatch.setattr(ModelRunner, "run", running)
    worker = Worker(make_engine(tiny_llama(), native=native).engine, sink)
    worker.send(Submit(make_sequence([1, 2, 3], max_new_tokens=3)))
    worker.start()
    wait_until(lambda: order.count("token") == 3, "the sequence ends")
    worker.stop()
    step = ["begins", "token", "ends"]
    assert order == ["begins", "ends", *step, *step, "token"]


def test_tokens_are_told_before_an_adapter_is_merged(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    built = make_engine(tiny_llama(), mode=Mode.MERGED)
    switch = Merger.switch

    def switching(self: Merger, adapter: ResidentAdapter | None) -> None:
        order.append("switch")
        switch(self, adapter)

    monkeypatch.setattr(Merger, "switch", switching)
    built.engine.add(make_sequence([1, 2, 3], adapter=admit(built, folders["all"])))
    built.engine.step(lambda: order.append("told"))
    assert order == ["told", "switch", "told"]


def test_tokens_are_told_before_keys_and_values_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    engine = make_engine(tiny_llama(), prefill_chunk=64).engine
    copy = engine.runner.cache.copy

    def copying(copies: list[CellCopy]) -> None:
        order.append("copy")
        copy(copies)

    monkeypatch.setattr(engine.runner.cache, "copy", copying)
    engine.add(make_sequence(random_prompt(40, seed=0), max_new_tokens=2))
    for _ in range(2):
        engine.step(lambda: order.append("told"))
    assert order == ["told", "told", "copy", "told"]


def test_an_end_is_told_where_those_that_ran_beside_it_are_cancelled() -> None:
    engine = make_engine(tiny_llama()).engine
    events: list[EngineEvent] = []
    worker = Worker(engine, events.extend)
    short, cancelled = (make_sequence([1, 2, 3], max_new_tokens=number) for number in (1, 50))
    cancel_in_the_first_step(engine, worker, cancelled)
    worker.send(Submit(short))
    worker.send(Submit(cancelled))
    worker.start()
    wait_until(lambda: events, "the end of the one is told")
    worker.stop()
    assert [event.sequence_id for event in events] == [short.id]


def test_nothing_more_is_told_of_a_cancelled_sequence() -> None:
    """Of its last step neither, which the other's next step would tell."""
    engine = make_engine(tiny_llama()).engine
    events: list[EngineEvent] = []
    worker = Worker(engine, events.extend)
    one, other = (make_sequence([1, 2, number], max_new_tokens=3) for number in (3, 4))
    cancel_in_the_first_step(engine, worker, one)
    worker.send(Submit(one))
    worker.send(Submit(other))
    worker.start()
    wait_until(lambda: len(events) == 3, "the other ends")
    worker.stop()
    assert {event.sequence_id for event in events} == {other.id}


class Panic(BaseException):
    """As those of libraries in Rust arrive."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic, SystemExit])
def test_a_loop_that_breaks_fails_everybody_by_name_and_says_so(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[EngineEvent] = []
    left: list[int] = []
    engine = make_engine(tiny_llama()).engine

    def broken() -> list[EngineEvent]:
        raise kind("the books do not balance")

    monkeypatch.setattr(engine.scheduler, "schedule", broken)
    told: list[str] = []
    worker = Worker(engine, events.extend, lambda: told.append("broken"))
    sequences = [make_sequence([1, 2, 3]) for _ in range(2)]
    early, late = (Submit(one, partial(left.append, one.id)) for one in sequences)
    worker.send(early)
    worker.start()
    wait_until(lambda: events, "the loop breaks")
    worker.send(late)  # as of a request that was on its way
    worker.send(Cancel(late.sequence))
    worker.stop()
    why = f"the engine has stopped: {kind.__name__}: the books do not balance"
    assert events == [FailedEvent(one.id, why) for one in sequences]
    assert left == [one.id for one in sequences]
    assert worker.failure == why and not worker.alive
    assert told == ["broken"]


def test_a_step_that_breaks_as_the_loop_ends_does_not_keep_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was under way when it was told to stop."""
    worker = Worker(make_engine(tiny_llama()).engine, lambda _: None)

    def lost(_engine: Engine) -> list[EngineEvent]:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Engine, "finish", lost)
    worker.start()
    stopping = threading.Thread(target=worker.stop, daemon=True)
    stopping.start()
    stopping.join(20)
    assert not stopping.is_alive()
    assert worker.failure == "the engine has stopped: RuntimeError: the device is lost"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priorities here")
def test_the_engine_gives_way_to_what_is_short_and_waited_for() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine, found = niceness(), []
    worker = Worker(make_engine(tiny_llama()).engine, lambda _: found.append(niceness()))
    worker.send(Submit(make_sequence([1, 2, 3], max_new_tokens=1)))
    worker.start()
    wait_until(lambda: found, "the engine's first event")
    worker.stop()
    assert found == [min(mine + 5, 19)]
    assert niceness() == mine
