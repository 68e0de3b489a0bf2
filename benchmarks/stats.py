"""From the times of single requests to the figures of a cell. Times are seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When one request was sent, and when its first and its last token came."""

    sent: float
    first_token: float
    last_token: float
    num_output_tokens: int

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.first_token - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is only one."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """The median and the 95th percentile of a sample."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one cell. `tokens_per_s` counts output tokens of whole requests only."""

    num_requests: int
    num_failed: int
    num_output_tokens: int
    wall_s: float
    tokens_per_s: float
    ttft_s: Quantiles
    tpot_s: Quantiles | None


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two nearest ranks."""
    if not values or not 0 <= q <= 100:
        raise ValueError(f"percentile {q} of {len(values)} values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(timings: Sequence[Timing], *, wall_s: float, num_failed: int = 0) -> Summary:
    """The figures of a cell from its requests. Raises BenchmarkError where none succeeded."""
    if not timings:
        raise BenchmarkError(f"no request succeeded ({num_failed} failed)")
    num_tokens = sum(timing.num_output_tokens for timing in timings)
    tpots = [timing.tpot for timing in timings if timing.tpot is not None]
    return Summary(
        num_requests=len(timings),
        num_failed=num_failed,
        num_output_tokens=num_tokens,
        wall_s=wall_s,
        tokens_per_s=num_tokens / wall_s,
        ttft_s=_quantiles([timing.ttft for timing in timings]),
        tpot_s=_quantiles(tpots) if tpots else None,
    )


def _quantiles(values: Sequence[float]) -> Quantiles:
    return Quantiles(p50=percentile(values, 50), p95=percentile(values, 95))
