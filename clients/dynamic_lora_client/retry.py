"""When a refused request is sent again, and after how long."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx

from dynamic_lora_client.errors import InvalidArgument

_RETRIED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a request that got 429 or 503 is sent again.

    `max_attempts` counts the first one too: 1 switches retries off. The pause
    is the server's Retry-After where it sent one, else `first_wait` seconds,
    doubled each time. A random time is added, so that those who were refused
    together do not come back together: up to as much again (or `first_wait`, if
    that is more), `max_jitter` seconds at most. A pause that would bring the sum
    above `max_wait` seconds is not begun: the error is raised at once; what is
    added at random never does.

    Raises InvalidArgument.
    """

    max_attempts: int = 4
    max_wait: float = 60.0
    first_wait: float = 0.5
    max_jitter: float = 10.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidArgument("max_attempts must be at least 1.")
        if not all(one >= 0 for one in (self.max_wait, self.first_wait, self.max_jitter)):
            raise InvalidArgument("max_wait, first_wait and max_jitter must be 0 seconds or more.")


class RetryBudget:
    """What is left of a policy during one call; `draw` gives numbers from 0 to 1."""

    def __init__(self, policy: RetryPolicy, draw: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._draw = draw
        self._num_attempts = 0
        self._waited = 0.0

    def spend(self, response: httpx.Response) -> float | None:
        """Seconds to wait before sending again, or None: this answer is the last."""
        self._num_attempts += 1
        if response.status_code not in _RETRIED:
            return None
        wait = retry_after(response)
        if wait is None:
            wait = self._policy.first_wait * 2 ** (self._num_attempts - 1)
        if self._num_attempts >= self._policy.max_attempts:
            return None
        left = self._policy.max_wait - self._waited - wait
        if left < 0:
            return None
        wait += self._draw() * min(left, self._longest_jitter(wait))
        self._waited += wait
        return wait

    def _longest_jitter(self, wait: float) -> float:
        return min(max(wait, self._policy.first_wait), self._policy.max_jitter)


def retry_after(response: httpx.Response) -> float | None:
    """The Retry-After header in seconds, from either of its forms (RFC 9110, 10.2.3).

    None where it is missing or malformed; 0 for a date in the past.
    """
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
