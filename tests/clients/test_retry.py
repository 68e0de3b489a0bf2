from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import repeat

import httpx
import pytest

from dynamic_lora_client import InvalidArgument, RetryPolicy
from dynamic_lora_client.retry import RetryBudget, retry_after


def _answer(status: int, after: str | None = None) -> httpx.Response:
    return httpx.Response(status, headers={} if after is None else {"retry-after": after})


def test_retry_after_in_seconds() -> None:
    assert retry_after(_answer(429, "7")) == 7


def test_retry_after_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    wait = retry_after(_answer(503, soon))
    assert wait is not None and 20 < wait <= 30


def test_retry_after_in_the_past_is_now() -> None:
    assert retry_after(_answer(503, "Wed, 21 Oct 2015 07:28:00 -0000")) == 0


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e9", "9" * 400, "²", "Wed, 99 Oct"])
def test_malformed_retry_after_is_none(value: str) -> None:
    assert retry_after(_answer(429, value.encode("ascii", "replace").decode())) is None


def test_pauses_double_without_advice_until_the_attempts_are_spent() -> None:
    budget = RetryBudget(RetryPolicy(max_attempts=4, first_wait=0.5, max_jitter=0))
    assert [budget.spend(_answer(503)) for _ in range(4)] == [0.5, 1.0, 2.0, None]


def test_pauses_stop_at_the_sum_allowed() -> None:
    budget = RetryBudget(RetryPolicy(max_attempts=9, max_wait=5, max_jitter=0))
    assert [budget.spend(_answer(429, "3")) for _ in range(2)] == [3, None]


@pytest.mark.parametrize(
    ("after", "longest"),
    [("3", 6), ("0", 0.5), ("25", 35), (None, 1.0), ("58", 60)],
    ids=["as much again", "no advised pause", "at most max_jitter", "no advice", "within max_wait"],
)
def test_a_random_time_is_added_to_the_pause(after: str | None, longest: float) -> None:
    """Otherwise all who were refused together come back together."""
    shortest = 0.5 if after is None else float(after)
    for draw, wait in ((0.0, shortest), (0.5, (shortest + longest) / 2), (1.0, longest)):
        budget = RetryBudget(RetryPolicy(), repeat(draw).__next__)
        assert budget.spend(_answer(429, after)) == wait


def test_no_two_budgets_draw_the_same() -> None:
    waits = {RetryBudget(RetryPolicy()).spend(_answer(429, "3")) for _ in range(10)}
    assert len(waits) == 10
    assert all(wait is not None and 3 <= wait <= 6 for wait in waits)


def test_the_random_time_counts_as_waited() -> None:
    budget = RetryBudget(RetryPolicy(max_attempts=9, max_wait=8), lambda: 1.0)
    assert [budget.spend(_answer(429, "3")) for _ in range(2)] == [6, None]


@pytest.mark.parametrize("status", [200, 400, 404, 500, 502])
def test_other_answers_are_final(status: int) -> None:
    assert RetryBudget(RetryPolicy()).spend(_answer(status, "1")) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_attempts": 0}, "max_attempts must be at least 1"),
        ({"max_wait": -1.0}, "max_wait, first_wait and max_jitter must be 0 seconds or more"),
        ({"first_wait": float("nan")}, "first_wait and max_jitter must be 0 seconds or more"),
        ({"max_jitter": float("nan")}, "first_wait and max_jitter must be 0 seconds or more"),
    ],
)
def test_policy_refuses_values_without_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        RetryPolicy(**values)  # type: ignore[arg-type]
