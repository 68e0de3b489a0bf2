"""The figures of a cell."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.errors import BenchmarkError
from benchmarks.stats import Timing, percentile, summarise

_TIMES = st.lists(st.floats(0, 1e3), min_size=1, max_size=50)


def _timing(sent: float, first: float, last: float, num_tokens: int) -> Timing:
    return Timing(sent=sent, first_token=first, last_token=last, num_output_tokens=num_tokens)


def test_percentile_interpolates_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert percentile([7.0], 95) == 7.0


@given(_TIMES)
def test_percentile_50_is_the_median(values: list[float]) -> None:
    assert percentile(values, 50) == pytest.approx(statistics.median(values))


@given(_TIMES)
def test_percentile_ends_are_the_extremes(values: list[float]) -> None:
    assert (percentile(values, 0), percentile(values, 100)) == (min(values), max(values))


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_percentile_refuses(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match=f"percentile {q} of {len(values)} values"):
        percentile(values, q)


def test_summary_counts_tokens_over_the_wall_time() -> None:
    timings = [_timing(0, 1, 4, 4), _timing(0, 3, 5, 2)]
    summary = summarise(timings, wall_s=5.0, num_failed=1)
    assert summary.tokens_per_s == pytest.approx(6 / 5)
    assert (summary.num_requests, summary.num_failed, summary.num_output_tokens) == (2, 1, 6)
    assert summary.ttft_s.p50 == 2.0
    # (4 - 1) / 3 and (5 - 3) / 1: the first token is not part of the time per output token.
    assert summary.tpot_s is not None
    assert summary.tpot_s.p50 == pytest.approx(1.5)


def test_a_single_token_has_no_time_per_output_token() -> None:
    assert summarise([_timing(0, 1, 1, 1)], wall_s=1.0).tpot_s is None


def test_no_success_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match=r"no request succeeded \(3 failed\)"):
        summarise([], wall_s=1.0, num_failed=3)
