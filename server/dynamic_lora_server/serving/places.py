"""How many continuations there may be at a time, and how many of them may wait for adapters."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dynamic_lora_server.errors import InvalidParameter, QueueFull
from dynamic_lora_server.serving.pace import Pace

# One place in so many is left to those who need not wait for an adapter.
_KEPT = 4


class Places:
    """Places for `max_running` continuations that run and `max_waiting` that wait.

    Those whose adapter is not on the device may wait there for long: for its files, for a merge to
    be computed, for room. They get three quarters of the places at most, so that the base
    model and the adapters that are there can go on. Lives on one event loop.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self.capacity = max_running + max_waiting
        self.most_held_up = max(1, self.capacity - max(1, self.capacity // _KEPT))
        self._num_open = self._num_held_up = 0
        self._pace, self._waits = Pace(), Pace()

    @property
    def num_open(self) -> int:
        """Continuations admitted and not yet ended."""
        return self._num_open

    @property
    def num_held_up(self) -> int:
        """Those of them that wait for their adapter."""
        return self._num_held_up

    def check(self, n: int) -> None:
        """Raise QueueFull where n more continuations have no place, InvalidParameter where they
        never will."""
        if n > self.capacity:
            raise InvalidParameter(
                f"n is {n}; the server takes {self.capacity} continuations at a time.",
                field="n",
                fix="Ask for fewer.",
            )
        if self._num_open + n > self.capacity:
            rounds = max(1.0, self._num_open / self._max_running)
            raise QueueFull(
                f"{self._num_open} continuations are running or waiting; the server takes "
                f"{self.capacity}.",
                retry_after=self._pace.retry_after(rounds),
            )

    @contextmanager
    def taken(self, n: int) -> Iterator[None]:
        """Places for n continuations until the block ends. Raises as `check` does."""
        self.check(n)
        self._num_open += n
        begin = time.monotonic()
        try:
            yield
            # One that was refused or given up says nothing of how long an answer takes.
            self._pace.record(time.monotonic() - begin)
        finally:
            self._num_open -= n

    @contextmanager
    def held_up(self, n: int) -> Iterator[None]:
        """While n continuations that have places wait for their adapter.

        Raises QueueFull where too many do; one request may always wait.
        """
        if self._num_held_up and self._num_held_up + n > self.most_held_up:
            raise QueueFull(
                f"{self._num_held_up} continuations wait for adapters that are not on the device; "
                f"the server lets {self.most_held_up} wait for them.",
                retry_after=self._waits.retry_after(1),
            )
        self._num_held_up += n
        begin = time.monotonic()
        try:
            yield
            self._waits.record(time.monotonic() - begin)
        finally:
            self._num_held_up -= n
