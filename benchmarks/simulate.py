"""Simulates the choice between bypass and merged on traces, beside other ways to choose.

    python -m benchmarks.simulate --output docs/figures --page docs/policy-results.md
    python -m benchmarks.simulate --trace benchmarks/traces/shipped-tasks.jsonl
        --output docs/figures --page docs/policy-results.md
    python -m benchmarks.simulate --trace recorded.jsonl --costs HOME/costs/KEY.json

Needs no model and no torch; see docs/policy.md for what is simulated and how.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.command import RESULTS, command, say
from benchmarks.figures import save
from benchmarks.simulation.simulator import Outcome, Simulator, Step
from benchmarks.simulation.strategies import DrainAndMerge, PolicyStrategy, hindsight
from benchmarks.simulation.traces import TRACES, Shape, read_trace, synthetic
from benchmarks.stats import percentile
from dynamic_lora_server.modes.costs import StepCosts
from dynamic_lora_server.modes.policy import Mode
from dynamic_lora_server.recorder import Arrival

SYNTHETIC, RECORDED = (RESULTS / f"policy-{name}.json" for name in ("simulation", "recorded"))
MAX_RUNNING = 32

COSTS = {
    # Two CPU cores, SmolLM2-135M, adapters of rank 16 on all linear layers, as measured at a
    # start: what the kernels take alone, somewhat more than within whole layers in C++.
    "cpu": StepCosts(
        base=((1, 0.0236), (8, 0.0286), (32, 0.0674), (128, 0.243)),
        deltas=(
            (1, ((1, 0.0033), (4, 0.0034), (32, 0.0074))),
            (2, ((2, 0.0047), (8, 0.0048), (64, 0.0120))),
            (4, ((4, 0.0064), (16, 0.0066), (128, 0.0196))),
            (8, ((8, 0.0105), (32, 0.0105), (256, 0.0366))),
        ),
        switch_s=0.069,
    ),
    # The same with torch's operators in place of the C++, where deltas cost by the row: measured,
    # but for the point of 8 adapters at 512 rows, which is assumed.
    "cpu-torch": StepCosts(
        base=((1, 0.050), (8, 0.090), (32, 0.180), (512, 1.100)),
        deltas=(
            (1, ((1, 0.006), (8, 0.008), (32, 0.010), (512, 0.060))),
            (8, ((8, 0.020), (32, 0.045), (512, 0.090))),
        ),
        switch_s=0.150,
    ),
    # The profile in dLoRA's code: 15 ms merged, 27 ms unmerged, 20 ms to switch, whoever
    # is in the batch. What prompts cost is assumed.
    "gpu-like": StepCosts(
        base=((1, 0.015), (64, 0.015), (512, 0.045)),
        deltas=((1, ((1, 0.012), (64, 0.012), (512, 0.015))),),
        switch_s=0.020,
    ),
}
LOADS = ("closed", "light", "backlog")
# Open loops: arrivals as a share of what bypass can serve of eight adapters, full batches.
_SHARES = {"light": 0.5, "backlog": 1.5}
STRATEGIES = ("bypass", "auto", "drain-and-merge", "merged", "oracle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One strategy on one trace. Shares are of the generated tokens."""

    costs: str
    load: str
    trace: str
    strategy: str
    tokens_per_s: float
    mean_latency_s: float
    p95_latency_s: float
    num_switches: int
    merged_share: float
    differential_share: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("simulate", __doc__)
    root.add_argument("--output", type=Path, help="folder for one plot per trace")
    kept = f"results (with --output: {SYNTHETIC.name} or {RECORDED.name})"
    root.add_argument("--json", type=Path, help=kept)
    root.add_argument("--page", type=Path, help="page whose tables are to be replaced")
    measured = "what a server measured, HOME/costs/*.json, in place of the built-in costs"
    root.add_argument("--costs", type=Path, help=measured)
    root.add_argument("--trace", type=Path, help="recorded JSONL, in place of the synthetic ones")
    root.add_argument("--requests", type=int, default=600, help="per synthetic trace")
    return root


def read_costs(path: Path) -> StepCosts:
    """The step costs in a file that a server keeps. ValueError for another, or without switches."""
    text = path.read_text(encoding="utf-8")
    try:
        costs = StepCosts.from_json(json.loads(text)["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no costs that a server measured: {error!r}") from error
    if math.isinf(costs.switch_s):
        raise ValueError(f"{path} holds no cost of a switch: take that of a server that can merge")
    return costs


def rate(costs: StepCosts, share: float) -> float:
    """Requests per second that keep a bypass server of eight adapters `share` busy."""
    shape = Shape(rate=1.0)
    prompt_row_s = (costs.step_s(512) - costs.step_s(MAX_RUNNING)) / (512 - MAX_RUNNING)
    step_s = costs.step_s(MAX_RUNNING) + costs.delta_s(MAX_RUNNING, shape.num_adapters)
    token_s = step_s / MAX_RUNNING
    return share / (shape.mean_prompt_tokens * prompt_row_s + shape.mean_output_tokens * token_s)


def simulate(trace: Sequence[Arrival], costs: StepCosts, *, closed: bool) -> dict[str, Outcome]:
    """Every strategy on one trace, by name; `closed`: by 32 clients, whatever the arrivals."""
    num_clients = MAX_RUNNING if closed else None
    simulator = Simulator(costs, max_running=MAX_RUNNING, num_clients=num_clients)
    num_adapters = len({arrival.adapter for arrival in trace} - {None})
    drain = DrainAndMerge(costs, max_running=MAX_RUNNING, num_adapters=num_adapters)
    return {
        "bypass": simulator.run(trace, PolicyStrategy(costs, Mode.BYPASS)),
        "auto": simulator.run(trace, PolicyStrategy(costs, Mode.AUTO)),
        "drain-and-merge": simulator.run(trace, drain),
        "merged": simulator.run(trace, PolicyStrategy(costs, Mode.MERGED)),
        "oracle": hindsight(simulator, trace, costs),
    }


def summarise(where: tuple[str, str, str], strategy: str, outcome: Outcome) -> Result:
    """The figures of an outcome, rounded to what is worth keeping."""
    costs, load, trace = where
    latencies = outcome.latencies_s
    return Result(
        costs=costs,
        load=load,
        trace=trace,
        strategy=strategy,
        tokens_per_s=round(outcome.tokens_per_s, 3),
        mean_latency_s=round(sum(latencies) / len(latencies), 4),
        p95_latency_s=round(percentile(latencies, 95), 4),
        num_switches=outcome.num_switches,
        merged_share=round(outcome.num_merged_tokens / outcome.num_tokens, 4),
        differential_share=round(outcome.num_differential_tokens / outcome.num_tokens, 4),
    )


def tables(results: Sequence[Result]) -> str:
    """One table per costs and load, in Markdown."""
    parts = []
    for costs, load in dict.fromkeys((result.costs, result.load) for result in results):
        chosen = [result for result in results if (result.costs, result.load) == (costs, load)]
        others = STRATEGIES[1:]
        lines = [
            f"**{costs}, {load}**",
            "",
            f"| trace | bypass | {' | '.join(others)} | auto's tokens |",
            "|---|---|" + "---|" * len(others) + "---|",
        ]
        for trace in dict.fromkeys(result.trace for result in chosen):
            lines.append(_row({r.strategy: r for r in chosen if r.trace == trace}))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _row(by_strategy: Mapping[str, Result]) -> str:
    bypass, auto = by_strategy["bypass"], by_strategy["auto"]
    cells = [bypass.trace, f"{bypass.tokens_per_s:.1f} tok/s, {_latency(bypass)}"]
    for strategy in STRATEGIES[1:]:
        result = by_strategy[strategy]
        ratio = result.tokens_per_s / bypass.tokens_per_s
        cells.append(f"{ratio:.3f}, {_latency(result)}, {result.num_switches}")
    cells.append(f"{auto.merged_share:.0%} / {auto.differential_share:.0%}")
    return f"| {' | '.join(cells)} |"


def _latency(result: Result) -> str:
    return f"{result.mean_latency_s:.1f} / {result.p95_latency_s:.1f} s"


def put_tables(page: str, text: str, *, place: str = "simulation") -> str:
    """`page` with `text` between the two markers of a `place`. Raises ValueError without them."""
    begin, end = f"<!-- {place} begins -->", f"<!-- {place} ends -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no lines {begin} and {end}")
    head, rest = page.split(begin, 1)
    return f"{head}{begin}\n{text}{end}{rest.split(end, 1)[1]}"


def draw(trace: str, steps: Sequence[Step], results: Sequence[Result]) -> Figure:
    """What auto did with a trace over time, and how much each strategy serves of it."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_timeline(left, steps)
    left.set_title(f"{trace}: rows by adapter under auto (cpu, closed); below, what is merged")
    _draw_bars(right, [result for result in results if result.trace == trace])
    return figure


def _draw_timeline(axes: Axes, steps: Sequence[Step], num_bins: int = 80) -> None:
    adapters = sorted({adapter for step in steps for adapter in step.rows if adapter is not None})
    colours = {name: f"C{index % 10}" for index, name in enumerate(adapters)}
    size = max(len(steps) // num_bins, 1)
    bins = [steps[start : start + size] for start in range(0, len(steps), size)]
    times = [chunk[0].start_s for chunk in bins]
    means = [
        [
            sum(min(step.rows.get(name, 0), MAX_RUNNING) for step in chunk) / len(chunk)
            for chunk in bins
        ]
        for name in adapters
    ]
    axes.stackplot(times, means, colors=[colours[name] for name in adapters], labels=adapters)
    for start, stop, merged in _stays(steps):
        colour = "white" if merged is None else colours[merged]
        axes.broken_barh([(start, stop - start)], (-4, 3), color=colour)
    axes.set(xlabel="seconds", ylabel="token rows a step", xlim=(times[0], steps[-1].start_s))
    axes.set_ylim(-6, 1.3 * max(sum(column) for column in zip(*means, strict=True)))
    axes.legend(fontsize="x-small", loc="upper center", ncols=4)


def _stays(steps: Sequence[Step]) -> Iterator[tuple[float, float, str | None]]:
    """From when to when what was merged."""
    start = steps[0]
    for step in steps[1:]:
        if step.merged != start.merged:
            yield start.start_s, step.start_s, start.merged
            start = step
    yield start.start_s, steps[-1].start_s, start.merged


def _draw_bars(axes: Axes, results: Sequence[Result]) -> None:
    groups = list(dict.fromkeys((r.costs, r.load) for r in results if r.load != "light"))
    rates = {(r.costs, r.load, r.strategy): r.tokens_per_s for r in results}
    width = 1 / (len(STRATEGIES) + 1)
    for index, strategy in enumerate(STRATEGIES):
        heights = [rates[(*g, strategy)] / rates[(*g, "bypass")] for g in groups]
        places = [group + index * width for group in range(len(groups))]
        axes.bar(places, heights, width, label=strategy)
    axes.set_xticks([group + 0.4 for group in range(len(groups))], [f"{c}\n{d}" for c, d in groups])
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(title="tokens per second, bypass = 1", ylim=(0.5, 2.0))
    axes.legend(fontsize="x-small")


def _traces(options: argparse.Namespace) -> dict[str, Callable[[float], list[Arrival]]]:
    """Each trace by name, made for a rate (recorded ones have their own)."""
    if options.trace is not None:
        recorded = read_trace(options.trace)
        return {options.trace.stem: lambda _: recorded}

    def make(kind: str) -> Callable[[float], list[Arrival]]:
        return lambda rate: synthetic(kind, Shape(rate=rate, num_requests=options.requests))

    return {kind: make(kind) for kind in TRACES}


def run(options: argparse.Namespace) -> list[Result]:
    """Simulate everything that was asked for, drawing on the way."""
    all_costs = COSTS
    if options.costs is not None:
        all_costs = {options.costs.stem: read_costs(options.costs)}
    loads = ("closed", "recorded") if options.trace is not None else LOADS
    results, shown = [], {}
    for costs_name, costs in all_costs.items():
        for load in loads:
            for trace_name, make in _traces(options).items():
                trace = make(rate(costs, _SHARES.get(load, 1.0)))
                outcomes = simulate(trace, costs, closed=load == "closed")
                where = (costs_name, load, trace_name)
                results += [summarise(where, name, out) for name, out in outcomes.items()]
                shown[where] = outcomes["auto"].steps
                say(f"{costs_name} {load} {trace_name} done")
    if options.output is not None:
        for trace_name in _traces(options):
            figure = draw(trace_name, shown["cpu", "closed", trace_name], results)
            save(figure, options.output / f"policy-{trace_name}.svg")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1, with the reason on standard error, if an input cannot be used."""
    root = parser()
    options = root.parse_args(arguments)
    if options.output is not None and options.costs is not None:
        root.error("--output draws the built-in costs; leave out --costs")
    recorded = options.trace is not None
    try:
        results = run(options)
        text = tables(results)
        if options.page is not None:
            page = options.page.read_text(encoding="utf-8")
            place = "recorded" if recorded else "simulation"
            options.page.write_text(put_tables(page, text, place=place), encoding="utf-8")
    except (OSError, ValueError) as error:
        say(str(error))
        return 1
    target = options.json
    if target is None and options.output is not None:
        target = RECORDED if recorded else SYNTHETIC
    if target is not None:
        rows = ",\n".join(json.dumps(asdict(result)) for result in results)
        target.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
