"""The engine thread, and the mailbox between it and everybody else."""

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from dynamic_lora_server.engine.engine import Engine, EngineEvent, FailedEvent, TokenEvent
from dynamic_lora_server.engine.outbox import EventSink, Outbox
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.noop import noop

logger = logging.getLogger(__name__)

# More niceness than the process has: an adapter that is read beside a batch got a third of a
# core without it.
_NICER_BY = 5
_NICEST = 19


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue this sequence; `left` is called once, on the engine thread, when it has ended.

    No step is started with it from then on. One that is on its way on a GPU may still
    read its adapter's slot, and `CudaUpload` writes to none before such a step is done.
    """

    sequence: Sequence
    left: Callable[[], object] = noop


@dataclass(frozen=True, slots=True)
class Cancel:
    """End this sequence at once and say nothing more about it."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """Unmerge, so that the merged adapter's slot may be given to another.

    `done` is called if there was something to unmerge, with `doomed_only` an adapter which has been
    deleted; or if a step has unmerged something since it was last asked.
    """

    doomed_only: bool
    done: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Stop:
    """Fail everything and leave the loop."""


Message = Submit | Cancel | MakeRoom | Stop


class Worker:
    """Owns the engine thread. `sink` is called on that thread with the events of each step: on a
    CPU, where another step follows, when the model computes that.

    Messages are handled between steps, in the order in which they were sent. Should the loop
    break, beyond what a step answers for, everything fails by name, also what is sent later,
    and `on_broken` is called once on that thread.
    Where the model runs on the processor, the thread and those that it starts to compute with give
    way to what is short and somebody waits for: HTTP, tokenising, reading an adapter.
    """

    def __init__(
        self, engine: Engine, sink: EventSink, on_broken: Callable[[], object] = noop
    ) -> None:
        self._engine = engine
        self._outbox = Outbox(sink)
        self._on_broken = on_broken
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._live: dict[int, Submit] = {}
        self._failure: str | None = None
        self._told_to_stop = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def send(self, message: Message) -> None:
        """Leave a message; never blocks."""
        self._inbox.put(message)

    def stop(self) -> None:
        """Fail what is left, end the thread and wait for it."""
        self.send(Stop())
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the step loop runs."""
        return self._thread.is_alive() and self._failure is None

    @property
    def failure(self) -> str | None:
        """Why the step loop broke, if it did."""
        return self._failure

    @torch.inference_mode()
    def _loop(self) -> None:
        if self._engine.on_host:
            _give_way()
        try:
            while self._read_mail():
                events = self._engine.step(self._outbox.send)
                self._outbox.send()  # where it did not compute
                self._deliver(events)
            self._deliver(self._engine.finish())
            self._outbox.send()
        except BaseException as error:  # nobody waits for this thread: it must say so itself
            logger.exception("The engine has stopped")
            self._failure = f"the engine has stopped: {type(error).__name__}: {error}"
            self._refuse_all(self._failure)
        else:
            self._fail_the_rest()

    def _deliver(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, FailedEvent):
                logger.error("sequence %d failed: %s", event.sequence_id, event.message)
                self._finish(event.sequence_id)
            elif isinstance(event, TokenEvent) and event.reason is not None:
                self._finish(event.sequence_id)
        self._outbox.put(events)
        if not self._engine.on_host:
            self._outbox.send()

    def _read_mail(self) -> bool:
        """Handle all messages, waiting for one if there is nothing to run; False on Stop."""
        while True:
            if not self._engine.has_work:
                # No step follows to send events beside; Cancel may have removed the last sequence.
                self._outbox.send()
            try:
                message = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            match message:
                case Submit(sequence):
                    self._live[sequence.id] = message
                    self._engine.add(sequence)
                case Cancel(sequence):
                    self._engine.cancel(sequence)
                    self._outbox.drop(sequence.id)
                    self._finish(sequence.id)
                case MakeRoom(doomed_only, done):
                    self._outbox.send()
                    if self._engine.modes.make_room(doomed_only=doomed_only):
                        done()
                case Stop():
                    self._told_to_stop = True
                    return False

    def _finish(self, sequence_id: int) -> None:
        if (submitted := self._live.pop(sequence_id, None)) is not None:
            submitted.left()

    def _refuse_all(self, why: str) -> None:
        """Fail what runs and all that is sent, until the server stops; the engine is left alone."""
        self._fail(why)
        self._on_broken()
        while True:
            try:
                message = self._inbox.get(block=not self._told_to_stop)
            except queue.Empty:
                return
            if isinstance(message, Submit):
                self._live[message.sequence.id] = message
                self._fail(why)
            elif isinstance(message, Stop):
                self._told_to_stop = True

    def _fail_the_rest(self) -> None:
        while not self._inbox.empty():
            late = self._inbox.get()
            if isinstance(late, Submit):
                self._live[late.sequence.id] = late
                self._engine.add(late.sequence)
        for submitted in self._live.values():
            self._engine.cancel(submitted.sequence)
        self._fail("the server is shutting down")

    def _fail(self, why: str) -> None:
        ended = list(self._live)
        for sequence_id in ended:
            self._finish(sequence_id)
        self._outbox.put([FailedEvent(sequence_id, why) for sequence_id in ended])
        self._outbox.send()


def _give_way() -> None:
    """Lower the calling thread's priority where threads have one of their own (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    thread = threading.get_native_id()
    with suppress(OSError):  # some sandboxes forbid it, and all that is lost is some latency
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICER_BY
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, _NICEST))
