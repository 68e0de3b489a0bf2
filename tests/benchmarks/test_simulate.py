import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulate import (
    COSTS,
    LOADS,
    RECORDED,
    STRATEGIES,
    SYNTHETIC,
    Result,
    main,
    put_tables,
    rate,
    simulate,
    tables,
)
from benchmarks.simulation.simulator import Simulator
from benchmarks.simulation.strategies import PolicyStrategy
from benchmarks.simulation.traces import TRACES, Shape, synthetic
from dynamic_lora_server.modes.costs import StepCosts
from dynamic_lora_server.modes.policy import Mode
from dynamic_lora_server.recorder import Arrival
from tests.support.traces import record

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "benchmarks" / "traces" / "shipped-tasks.jsonl"
PAGE = ROOT / "docs" / "policy-results.md"
SUMMARY = ROOT / "docs" / "policy.md"


def throughput(costs: StepCosts, trace: list[Arrival], mode: Mode, *, closed: bool) -> float:
    simulator = Simulator(costs, num_clients=32 if closed else None)
    return simulator.run(trace, PolicyStrategy(costs, mode)).tokens_per_s


@pytest.mark.parametrize("costs_name", COSTS)
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("kind", TRACES)
def test_auto_is_never_far_below_bypass(kind: str, closed: bool, costs_name: str) -> None:
    costs = COSTS[costs_name]
    trace = synthetic(kind, Shape(rate=rate(costs, 1.5), num_requests=150, seed=3))
    auto = throughput(costs, trace, Mode.AUTO, closed=closed)
    assert auto >= 0.97 * throughput(costs, trace, Mode.BYPASS, closed=closed)


def test_on_zipf_auto_is_above_bypass_and_drain_and_merge_where_deltas_cost_by_the_row() -> None:
    costs = COSTS["cpu-torch"]
    trace = synthetic("zipf-1.5", Shape(rate=1.0, num_requests=600, seed=3))
    outcomes = simulate(trace, costs, closed=True)
    rates = {name: outcome.tokens_per_s for name, outcome in outcomes.items()}
    assert set(rates) == set(STRATEGIES)
    assert rates["auto"] > 1.01 * rates["bypass"]
    assert rates["auto"] > 1.01 * rates["drain-and-merge"]
    assert rates["auto"] <= 1.001 * rates["oracle"]


def test_one_adapter_costs_hardly_more_than_the_base_model() -> None:
    costs = COSTS["cpu"]
    trace = synthetic("single", Shape(rate=1.0, num_requests=600))
    base = [
        Arrival(
            arrival_s=0.0,
            adapter=None,
            num_prompt_tokens=arrival.num_prompt_tokens,
            num_output_tokens=arrival.num_output_tokens,
        )
        for arrival in trace
    ]
    auto = throughput(costs, trace, Mode.AUTO, closed=True)
    assert auto >= 0.98 * throughput(costs, base, Mode.AUTO, closed=True)


def test_the_page_shows_the_results_that_are_kept() -> None:
    results = [Result(**row) for row in json.loads(SYNTHETIC.read_text())]
    assert {result.trace for result in results} == set(TRACES)
    assert {result.load for result in results} == set(LOADS)
    page = PAGE.read_text()
    assert put_tables(page, tables(results)) == page
    recorded = [Result(**row) for row in json.loads(RECORDED.read_text())]
    assert {result.trace for result in recorded} == {TRACE.stem}
    assert put_tables(page, tables(recorded), place="recorded") == page
    assert f"figures/policy-{TRACE.stem}.svg" in page
    for trace in TRACES:
        assert f"figures/policy-{trace}.svg" in page
        assert (PAGE.parent / "figures" / f"policy-{trace}.svg").exists()


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("trace", ["single", "one-hot", "zipf-1.5", "uniform", "moving"])
def test_the_summary_shows_the_results_that_are_kept(trace: str, costs: str) -> None:
    results = [Result(**row) for row in json.loads(SYNTHETIC.read_text())]
    where = (costs, "closed", trace)
    rates = {r.strategy: r.tokens_per_s for r in results if (r.costs, r.load, r.trace) == where}
    bypass = rates["bypass"]
    ratios = [f"{rates[strategy] / bypass:.3f}" for strategy in STRATEGIES[1:]]
    row = " | ".join([costs, trace, f"{bypass:.1f}", *ratios])
    assert f"| {row} |\n" in SUMMARY.read_text()


def test_the_command_draws_a_plot_per_trace_and_fills_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text("# Page\n<!-- simulation begins -->\nold\n<!-- simulation ends -->\nfoot\n")
    output = tmp_path / "figures"
    arguments = ["--output", str(output), "--json", str(kept), "--page", str(page)]
    assert main([*arguments, "--requests", "3"]) == 0
    assert {path.name for path in output.iterdir()} == {f"policy-{kind}.svg" for kind in TRACES}
    results = [Result(**row) for row in json.loads(kept.read_text())]
    assert len(results) == len(COSTS) * len(LOADS) * len(TRACES) * len(STRATEGIES)
    assert capsys.readouterr().out == tables(results)
    assert tables(results) in page.read_text()
    assert "old" not in page.read_text() and page.read_text().endswith("foot\n")


def test_recorded_traces_and_measured_costs_can_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, costs = tmp_path / "monday.jsonl", tmp_path / "mine.json"
    record(trace, synthetic("one-hot", Shape(rate=2.0, num_requests=20)))
    costs.write_text(json.dumps({"kernels": "[]", "steps": COSTS["cpu"].to_json()}))
    assert main(["--trace", str(trace), "--costs", str(costs)]) == 0
    out = capsys.readouterr().out
    assert "**mine, closed**" in out and "**mine, recorded**" in out
    assert "| monday | " in out


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    assert main(["--costs", str(tmp_path / "bad.json")]) == 1
    assert "bad.json holds no costs that a server measured" in capsys.readouterr().err
    never = json.dumps({"kernels": "[]", "steps": StepCosts.never_merging().to_json()})
    (tmp_path / "bypass.json").write_text(never)
    assert main(["--costs", str(tmp_path / "bypass.json")]) == 1
    assert "bypass.json holds no cost of a switch" in capsys.readouterr().err


def test_plots_are_of_the_built_in_costs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", "x", "--costs", "y"])
    assert "leave out --costs" in capsys.readouterr().err


def test_the_recorded_trace_is_drawn_and_auto_serves_it_as_fast_as_bypass(tmp_path: Path) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text("<!-- recorded begins -->\n<!-- recorded ends -->\n")
    arguments = ["--trace", str(TRACE), "--output", str(tmp_path), "--page", str(page)]
    assert main([*arguments, "--json", str(kept)]) == 0
    assert (tmp_path / f"policy-{TRACE.stem}.svg").exists()
    rates = {
        (row["costs"], row["load"], row["strategy"]): row["tokens_per_s"]
        for row in json.loads(kept.read_text())
    }
    for costs, load, strategy in rates:
        if strategy == "auto":
            assert rates[costs, load, "auto"] >= 0.98 * rates[costs, load, "bypass"]


def test_no_torch_is_needed() -> None:
    code = "import sys, benchmarks.simulate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has no lines"):
        put_tables("# Page\n", "table\n")
