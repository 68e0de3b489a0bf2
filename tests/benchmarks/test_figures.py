"""The plots: drawn from results, the same bytes each time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cells import Cell, LimitCell
from benchmarks.figures import latency, many, save, throughput
from benchmarks.limit_rate import Limit
from benchmarks.machine import Machine
from benchmarks.report import Report
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
    packages={},
)


def _report() -> Report:
    report = Report(machine=MACHINE, base="a base", started_at="now")
    for peer in ("dynamic-lora", "other"):
        for popularity in ("base", "uniform"):
            for clients in (1, 8):
                timing = Timing(sent=0, first_token=0.5, last_token=1.0, num_output_tokens=10)
                workload = Workload(
                    num_clients=clients, popularity=Popularity.parse(popularity), num_requests=1
                )
                summary = summarise([timing], wall_s=1 / clients)
                report.cells.append(Cell(peer=peer, workload=workload, summary=summary))
    limit = Limit(
        num_clients=8,
        step_s=0.1,
        prefill_s=0.1,
        gbytes_per_s=20.0,
        bound="products",
        tokens_per_s=200.0,
    )
    report.limits.append(LimitCell(round=0, limit=limit))
    return report


def test_throughput_has_a_panel_for_each_popularity_and_a_line_for_each_peer() -> None:
    figure = throughput(_report())
    assert [axes.get_title() for axes in figure.axes] == ["base model", "mixed adapters"]
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == ["dynamic-lora", "machine limit, float32", "other"]


def test_latency_shows_the_mixed_workload() -> None:
    for axes, expected in zip(latency(_report()).axes, (500.0, 500 / 9), strict=True):
        heights = [y for line in axes.lines for _, y in np.asarray(line.get_xydata()).tolist()]
        # Two peers, two numbers of clients; the caps of the whiskers are lines of their own.
        assert heights == pytest.approx([expected] * len(heights))
        assert len(heights) >= 4


def test_many_adapters_are_drawn_over_their_number() -> None:
    cells: list[dict[str, Any]] = [
        {"num_adapters": n, "start_s": 1.0, "summary": {"tokens_per_s": rate}}
        for n, rate in ((8, 100.0), (8, 90.0), (1000, 80.0))
    ]
    left, _ = many({"cells": cells}).axes
    assert np.asarray(left.lines[0].get_xydata()).tolist() == [[8, 95.0], [1000, 80.0]]


def test_a_figure_is_saved_with_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "figure.svg", tmp_path / "b" / "figure.svg"
    save(throughput(_report()), first)
    save(throughput(_report()), second)
    assert first.read_bytes() == second.read_bytes()
