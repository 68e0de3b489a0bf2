"""The table and the JSON of a run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cells import Cell, LimitCell
from benchmarks.errors import BenchmarkError
from benchmarks.limit_rate import Limit
from benchmarks.machine import Machine, describe_machine
from benchmarks.report import Report, spread
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
    assert "| fast | 8 zipf:1.1 | 8 | 5.5 | - | 250 / 250 | 100.0 / 100.0 | 1 + 1 failed |" in lines
    assert "| slow | base | 8 | failed: it broke |  |  |  |  |" in lines
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


def _two_rounds() -> Report:
    report = Report(machine=MACHINE, base="a base", started_at="now", weights={"fast": "float32"})
    for number, wall_s in enumerate((2.0, 1.0)):
        timing = Timing(sent=0, first_token=0.25, last_token=1.25, num_output_tokens=11)
        summary = summarise([timing], wall_s=wall_s)
        report.cells.append(
            Cell(
                peer="fast",
                workload=WORKLOAD,
                summary=summary,
                round=number,
                clocks=(100.0, 120.0 + number),
            )
        )
        limit = Limit(
            num_clients=8,
            step_s=0.05,
            prefill_s=0.5,
            gbytes_per_s=20.0,
            bound="products",
            tokens_per_s=22.0 + 4.4 * number,
        )
        report.limits.append(LimitCell(round=number, limit=limit))
    return report


def test_rounds_are_one_row_with_its_share_of_the_limit() -> None:
    lines = _two_rounds().to_markdown().splitlines()
    # 5.5 of 22.0 and 11.0 of 26.4 tokens per second: 25 % and 42 %.
    row = "| fast | 8 zipf:1.1 | 8 | 8.2 (5.5 to 11.0) | 33% | 250 / 250 | 100.0 / 100.0 | 2 |"
    assert row in lines
    limit = "| machine limit (products, float32) |  | 8 | 24.2 (22.0 to 26.4) |  |  | 50.0 |  |"
    assert limit in lines
    clock = "Clock beside the cells: 110 GFLOP/s on a fixed product, from 110 to 110"
    assert clock in lines


def test_weights_of_another_width_have_no_share() -> None:
    report = _two_rounds()
    report.weights["fast"] = "q8_0"
    assert "| 8.2 (5.5 to 11.0) | - |" in report.to_markdown()


def test_a_written_report_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for report in (_report(), _two_rounds()):
        report.write(path)
        assert Report.read(path) == report


def test_a_report_from_before_there_was_a_choice_is_of_greedy_decoding(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    document = _report().to_json()
    for cell in document["cells"]:
        del cell["workload"]["sampling"]
    path.write_text(json.dumps(document))
    assert Report.read(path) == _report()


def test_another_file_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"bars": []}')
    with pytest.raises(BenchmarkError, match=r"other.json is no report of this benchmark"):
        Report.read(path)


def test_a_spread_shows_its_ends() -> None:
    assert spread([2.0], 1) == "2.0"
    assert spread([1.0, 2.0, 4.0], 1) == "2.0 (1.0 to 4.0)"


def test_a_machine_has_a_short_name() -> None:
    assert MACHINE.slug == "cpu-avx2-2cores"
    assert replace(MACHINE, cpu_flags=["avx2", "amx_bf16"]).slug == "cpu-amx-bf16-2cores"
    assert replace(MACHINE, gpu="Some GPU (80 GB)").slug == "some-gpu-80-gb"


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cpu
    assert machine.num_cores >= 1
    assert machine.memory_gib > 0
    assert machine.packages["torch"] != "not installed"
    assert replace(machine, commit="abc1234+").line.endswith("; commit abc1234+")


def test_a_checkout_has_a_commit() -> None:
    """So has a clone without tags; what is no checkout has none."""
    if not (Path(__file__).parents[2] / ".git").exists():
        pytest.skip("not in a checkout")
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?", describe_machine().commit or "")
