"""Single measurements of a run, and the rounds of one cell taken together."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from benchmarks.limit_rate import Limit
from benchmarks.stats import Quantiles, Summary
from benchmarks.workload import Popularity, Sampling, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One peer on one workload in one round: its figures, or why there are none.

    `clocks` are the machine's clock just before and just after, in GFLOP/s (see `clock.py`).
    """

    peer: str
    workload: Workload
    summary: Summary | None
    error: str | None = None
    round: int = 0
    clocks: tuple[float, float] | None = None

    @property
    def clock(self) -> float | None:
        """The mean of the two clocks."""
        return None if self.clocks is None else statistics.fmean(self.clocks)

    def to_json(self) -> dict[str, Any]:
        """Plain values; popularity as written on the command line."""
        document = asdict(self)
        document["workload"]["popularity"] = str(self.workload.popularity)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        workload = dict(document["workload"])
        workload["popularity"] = Popularity.parse(workload["popularity"])
        # Reports from before there was a choice are of greedy decoding.
        workload["sampling"] = Sampling(**workload.get("sampling", {}))
        clocks = document["clocks"]
        return cls(
            peer=document["peer"],
            workload=Workload(**workload),
            summary=_summary(document["summary"]),
            error=document["error"],
            round=document["round"],
            clocks=None if clocks is None else (clocks[0], clocks[1]),
        )


def _summary(document: Mapping[str, Any] | None) -> Summary | None:
    if document is None:
        return None
    tpot = document["tpot_s"]
    return Summary(
        **{
            **document,
            "ttft_s": Quantiles(**document["ttft_s"]),
            "tpot_s": None if tpot is None else Quantiles(**tpot),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitCell:
    """The machine's limit for one number of clients in one round."""

    round: int
    limit: Limit


@dataclass(frozen=True, kw_only=True)
class Series:
    """The rounds of one peer on one workload."""

    peer: str
    num_clients: int
    popularity: str
    cells: tuple[Cell, ...]

    @property
    def label(self) -> str:
        """The workload's adapters, as `base` or `8 uniform`."""
        if self.popularity == "base":
            return "base"
        return f"{self.cells[0].workload.num_adapters} {self.popularity}"

    @cached_property
    def summaries(self) -> list[Summary]:
        """Those of the rounds that succeeded."""
        return [cell.summary for cell in self.cells if cell.summary is not None]

    @property
    def rates(self) -> dict[int, float]:
        """Tokens per second by round."""
        return {c.round: c.summary.tokens_per_s for c in self.cells if c.summary is not None}

    @property
    def clocks(self) -> dict[int, float]:
        """The clock by round, where it was read."""
        return {c.round: c.clock for c in self.cells if c.clock is not None}

    @property
    def tokens_per_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates.values())

    @property
    def ttft_s(self) -> Quantiles:
        """The rounds' medians of time to first token, per quantile."""
        return _median(summary.ttft_s for summary in self.summaries)

    @property
    def tpot_s(self) -> Quantiles | None:
        """The rounds' medians of time per output token, per quantile."""
        found = [summary.tpot_s for summary in self.summaries if summary.tpot_s is not None]
        return _median(found) if found else None

    @property
    def num_requests(self) -> int:
        """Of all rounds."""
        return sum(summary.num_requests for summary in self.summaries)

    @property
    def num_failed(self) -> int:
        """Of all rounds that were measured."""
        return sum(summary.num_failed for summary in self.summaries)

    @property
    def error(self) -> str | None:
        """Why the last failed round did."""
        return next((c.error for c in reversed(self.cells) if c.error is not None), None)


def series(cells: Iterable[Cell]) -> list[Series]:
    """The cells by workload and peer, in the order of their first measurement."""
    found: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in cells:
        workload = cell.workload
        key = (cell.peer, workload.num_clients, str(workload.popularity))
        found.setdefault(key, []).append(cell)
    return [
        Series(peer=peer, num_clients=clients, popularity=popularity, cells=tuple(group))
        for (peer, clients, popularity), group in found.items()
    ]


def _median(quantiles: Iterable[Quantiles]) -> Quantiles:
    found = list(quantiles)
    return Quantiles(
        p50=statistics.median(q.p50 for q in found), p95=statistics.median(q.p95 for q in found)
    )
