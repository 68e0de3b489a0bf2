"""What could not be fetched from the Hub lately, and when each is tried again."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dynamic_lora_adapters.errors import AdapterError, StoreFailed
from dynamic_lora_server.errors import InvalidParameter, ServerError
from dynamic_lora_server.intake.sources import SourceUnavailable

E = TypeVar("E", bound=AdapterError | ServerError)

# Seconds in which a name is left alone after its first failure, and at most: each further failure
# doubles them. Trouble on the way passes; a repository stays as it is until somebody mends it.
_ON_THE_WAY = (5.0, 60.0)
_OF_THE_ADAPTER = (30.0, 900.0)
_MOST_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a name could not be fetched, and from when on `clock` it is tried again."""

    error: AdapterError | ServerError
    until: float
    num_in_a_row: int

    def told(self, now: float) -> AdapterError | ServerError:
        """The error for one request, which says how long the pause still is."""
        seconds = max(1, math.ceil(self.until - now))
        error = _anew(self.error)
        when = f"The server asks the Hub again in {seconds} s."
        error.fix = f"{error.fix} {when}" if error.fix else when
        if isinstance(error, SourceUnavailable):
            error.retry_after = seconds
        return error


class HubFailures:
    """The last failure of each name. Of more than `_MOST_KEPT` the oldest are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._failures: dict[str, Failure] = {}

    def check(self, name: str) -> None:
        """Raise what the last fetch of a name met, unless it may be tried again."""
        failure = self._failures.get(name)
        if failure is not None and self.clock() < failure.until:
            raise failure.told(self.clock())

    def record(self, name: str, error: AdapterError | ServerError) -> Failure:
        """Leave a name alone for a while, the longer the more often it has failed."""
        before = self._failures.pop(name, None)
        num_in_a_row = 1 if before is None else before.num_in_a_row + 1
        first, longest = _ON_THE_WAY if _passes(error) else _OF_THE_ADAPTER
        pause = min(longest, math.ldexp(first, min(num_in_a_row, 16) - 1))
        failure = Failure(_anew(error), self.clock() + pause, num_in_a_row)
        self._failures[name] = failure
        if len(self._failures) > _MOST_KEPT:
            del self._failures[next(iter(self._failures))]
        return failure

    def forget(self, name: str) -> None:
        """A name was fetched: it has not failed."""
        self._failures.pop(name, None)


def _passes(error: AdapterError | ServerError) -> bool:
    """Whether it is trouble on the way, and no fault of the adapter's."""
    if isinstance(error, AdapterError):
        return isinstance(error, StoreFailed)
    return not isinstance(error, InvalidParameter)


def _anew(error: E) -> E:
    """The same error, without what it was raised in: it is kept, and told to many."""
    again = type(error).__new__(type(error), *error.args)
    again.__dict__.update(error.__dict__)
    return again
