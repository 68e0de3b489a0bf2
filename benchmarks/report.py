"""The results of a run, as a table to read and as JSON to keep."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.stats import Summary
from benchmarks.workload import Workload

_HEADER = (
    "system",
    "adapters",
    "clients",
    "tok/s",
    "TTFT p50 / p95 ms",
    "TPOT p50 / p95 ms",
    "requests",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One peer on one workload: its figures, or why there are none."""

    peer: str
    workload: Workload
    summary: Summary | None
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """A run: the machine, what each peer was, its cells, and who was left out and why."""

    machine: Machine
    base: str
    started_at: str
    cells: list[Cell] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The whole report; times in seconds, popularity as written on the command line."""
        document = asdict(self)
        for cell, written in zip(self.cells, document["cells"], strict=True):
            written["workload"]["popularity"] = str(cell.workload.popularity)
        return json.dumps(document, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The table, then what each peer was and who was left out."""
        lines = [_row(_HEADER), _row(["---"] * 3 + ["---:"] * 4)]
        lines += [_row(_columns(cell)) for cell in self.cells]
        lines += ["", f"Machine: {self.machine.line}", f"Base: {self.base}"]
        lines += [f"{peer}: {text}" for peer, text in self.versions.items()]
        lines += [f"Left out: {peer}: {reason}" for peer, reason in self.left_out.items()]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the JSON, making the folder where it is missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")


def _columns(cell: Cell) -> list[str]:
    workload = cell.workload
    adapters = (
        "base"
        if workload.popularity.kind == "base"
        else (f"{workload.num_adapters} {workload.popularity}")
    )
    start = [cell.peer, adapters, str(workload.num_clients)]
    if cell.summary is None:
        return [*start, f"failed: {cell.error}", "", "", ""]
    summary = cell.summary
    ttft, tpot = summary.ttft_s, summary.tpot_s
    failed = f" + {summary.num_failed} failed" if summary.num_failed else ""
    return [
        *start,
        f"{summary.tokens_per_s:.1f}",
        f"{ttft.p50 * 1e3:.0f} / {ttft.p95 * 1e3:.0f}",
        "-" if tpot is None else f"{tpot.p50 * 1e3:.1f} / {tpot.p95 * 1e3:.1f}",
        f"{summary.num_requests}{failed}",
    ]


def _row(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"
