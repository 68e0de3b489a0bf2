"""The results of a run, as tables to read and as JSON to keep."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.bar import Verdict, judge, weight_bits
from benchmarks.cells import Cell, LimitCell, Series, series
from benchmarks.command import write_json
from benchmarks.errors import BenchmarkError
from benchmarks.limit_rate import Limit
from benchmarks.machine import Machine
from benchmarks.stats import Quantiles

_HEADER = (
    "system",
    "adapters",
    "clients",
    "tok/s",
    "of the limit",
    "TTFT p50 / p95 ms",
    "TPOT p50 / p95 ms",
    "requests",
)
_BAR_HEADER = (
    "clients",
    "ours",
    "tok/s",
    "against",
    "tok/s",
    "ratio",
    "at one clock",
    "to reach",
    "reached",
)


@dataclass(slots=True, kw_only=True)
class Report:
    """A run: the machine, what each peer was, its cells, and who was left out and why.

    `weights` are the number formats of the peers' weights, `limit_weights` that of `limits`; `busy`
    is how many other processes computed while the cells were measured.
    """

    machine: Machine
    base: str
    started_at: str
    cells: list[Cell] = field(default_factory=list)
    limits: list[LimitCell] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    limit_weights: str = "float32"
    busy: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` has written. Raises BenchmarkError where it is no such file."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            del document["bars"], document["shares"]
            document["machine"] = Machine(**document["machine"])
            document["cells"] = [Cell.from_json(cell) for cell in document["cells"]]
            document["limits"] = [
                LimitCell(round=cell["round"], limit=Limit(**cell["limit"]))
                for cell in document["limits"]
            ]
            return cls(**document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path} is no report of this benchmark: {error!r}") from error

    def bars(self) -> list[Verdict]:
        """What is asked of this server, and what was reached."""
        return judge(self.cells, self.weights)

    def share_of_limit(self, found: Series) -> float | None:
        """A peer's rate over the machine's, in the same round: the median of the rounds.

        None where the limit was not measured, or for weights of another width.
        """
        if weight_bits(self.weights.get(found.peer)) != weight_bits(self.limit_weights):
            return None
        limits = {
            cell.round: cell.limit.tokens_per_s
            for cell in self.limits
            if cell.limit.num_clients == found.num_clients
        }
        shares = [rate / limits[number] for number, rate in found.rates.items() if number in limits]
        return statistics.median(shares) if shares else None

    def to_json(self) -> dict[str, Any]:
        """The whole report; times in seconds, popularity as written on the command line."""
        document = asdict(self)
        document["cells"] = [cell.to_json() for cell in self.cells]
        document["bars"] = [asdict(verdict) for verdict in self.bars()]
        document["shares"] = [
            {
                "peer": found.peer,
                "popularity": found.popularity,
                "num_clients": found.num_clients,
                "tokens_per_s": found.tokens_per_s,
                "share_of_limit": self.share_of_limit(found),
            }
            for found in series(self.cells)
            if found.rates
        ]
        return document

    def to_markdown(self) -> str:
        """The bars, the table of all cells, what each peer was and who was left out."""
        lines: list[str] = []
        if verdicts := self.bars():
            lines += table(_BAR_HEADER, map(_bar_columns, verdicts))
            lines.append("")
        lines += table(_HEADER, [*map(self._columns, series(self.cells)), *self._limit_rows()])
        lines += ["", f"Machine: {self.machine.line}", f"Base: {self.base}"]
        lines += [*self._sampling_lines(), *self._clock_lines()]
        lines += [f"{peer}: {text}" for peer, text in self.versions.items()]
        lines += [f"Left out: {peer}: {reason}" for peer, reason in self.left_out.items()]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the JSON, making the folder where it is missing; never half of it."""
        write_json(self.to_json(), path)

    def _columns(self, found: Series) -> list[str]:
        start = [found.peer, found.label, str(found.num_clients)]
        if not found.rates:
            return [*start, f"failed: {found.error}", "", "", "", ""]
        share = self.share_of_limit(found)
        failed = f" + {found.num_failed} failed" if found.num_failed else ""
        return [
            *start,
            spread(list(found.rates.values()), 1),
            "-" if share is None else f"{share:.0%}",
            _milliseconds(found.ttft_s, 0),
            "-" if found.tpot_s is None else _milliseconds(found.tpot_s, 1),
            f"{found.num_requests}{failed}",
        ]

    def _limit_rows(self) -> list[list[str]]:
        rows = []
        for num_clients in sorted({cell.limit.num_clients for cell in self.limits}):
            found = [c.limit for c in self.limits if c.limit.num_clients == num_clients]
            name = f"machine limit ({found[0].bound}, {self.limit_weights})"
            step_ms = statistics.median(limit.step_s for limit in found) * 1e3
            rates = [limit.tokens_per_s for limit in found]
            rows.append(
                [name, "", str(num_clients), spread(rates, 1), "", "", f"{step_ms:.1f}", ""]
            )
        return rows

    def _sampling_lines(self) -> list[str]:
        ways = dict.fromkeys(cell.workload.sampling for cell in self.cells)
        return [f"Tokens: {way}" for way in ways]

    def _clock_lines(self) -> list[str]:
        clocks = [cell.clock for cell in self.cells if cell.clock is not None]
        if not clocks:
            return []
        low, middle, high = min(clocks), statistics.median(clocks), max(clocks)
        text = f"{middle:.0f} GFLOP/s on a fixed product, from {low:.0f} to {high:.0f}"
        return [f"Clock beside the cells: {text}"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(columns)} |" for columns in lines]


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the largest where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _milliseconds(quantiles: Quantiles, digits: int) -> str:
    return f"{quantiles.p50 * 1e3:.{digits}f} / {quantiles.p95 * 1e3:.{digits}f}"


def _bar_columns(verdict: Verdict) -> list[Any]:
    start = [str(verdict.num_clients), f"{verdict.ours}, {verdict.our_adapters}"]
    against = f"{verdict.against}, {verdict.its_adapters}"
    goal = "-" if verdict.at_least is None else f"{verdict.at_least:g}"
    if not verdict.ratios:
        return [*start, "-", against, "-", "not measured", "", goal, "-"]
    reached = {None: "-", True: "yes", False: "no"}[verdict.reached]
    return [
        *start,
        f"{verdict.our_tokens_per_s:.1f}",
        against,
        f"{verdict.its_tokens_per_s:.1f}",
        spread(verdict.ratios, 2),
        "-" if verdict.at_one_clock is None else f"{verdict.at_one_clock:.2f}",
        goal,
        reached,
    ]
