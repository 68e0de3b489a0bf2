"""The table and the JSON of a run."""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import Machine, describe_machine
from benchmarks.report import Cell, Report
from benchmarks.stats import Timing, summarise
from benchmarks.workload import Popularity, Workload

MACHINE = Machine(
    cpu="a processor",
    num_cores=2,
    cpu_flags=["avx2"],
    memory_gib=24.0,
    gpu=None,
    system="an operating system",
    python="3.11.7",
    packages={"torch": "2.13.0"},
)
WORKLOAD = Workload(num_clients=8, popularity=Popularity.parse("zipf:1.1"), num_requests=1)


def _report() -> Report:
    timing = Timing(sent=0, first_token=0.25, last_token=1.25, num_output_tokens=11)
    report = Report(machine=MACHINE, base="a base", started_at="2030-01-01T00:00:00+00:00")
    summary = summarise([timing], wall_s=2.0, num_failed=1)
    base = replace(WORKLOAD, popularity=Popularity.parse("base"))
    report.cells.append(Cell(peer="fast", workload=WORKLOAD, summary=summary))
    report.cells.append(Cell(peer="slow", workload=base, summary=None, error="it broke"))
    report.versions["fast"] = "1.0"
    report.left_out["absent"] = "no wheel for this machine"
    return report


def test_the_table_shows_figures_failures_and_who_was_left_out() -> None:
    lines = _report().to_markdown().splitlines()
    assert "| fast | 8 zipf:1.1 | 8 | 5.5 | 250 / 250 | 100.0 / 100.0 | 1 + 1 failed |" in lines
    assert "| slow | base | 8 | failed: it broke |  |  |  |" in lines
    assert "fast: 1.0" in lines
    assert "Left out: absent: no wheel for this machine" in lines
    assert any("a processor, 2 cores; avx2; 24 GiB; no GPU" in line for line in lines)


def test_the_json_holds_the_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.json"
    _report().write(path)
    document = json.loads(path.read_text())
    first, second = document["cells"]
    assert first["workload"]["popularity"] == "zipf:1.1"
    assert first["summary"]["tokens_per_s"] == 5.5
    assert (second["summary"], second["error"]) == (None, "it broke")
    assert document["machine"]["num_cores"] == 2
    assert document["left_out"] == {"absent": "no wheel for this machine"}


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cpu
    assert machine.num_cores >= 1
    assert machine.memory_gib > 0
    assert machine.packages["torch"] != "not installed"
