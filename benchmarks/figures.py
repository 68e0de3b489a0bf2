"""Plots of the results: throughput over clients and over adapters, and latencies.

    python -m benchmarks.figures

Draws what there are results of, for this machine unless `--compare` or `--many` name others.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.cells import LimitCell, Series, series
from benchmarks.command import RESULTS, command, exit_with_reason, say
from benchmarks.machine import describe_machine
from benchmarks.report import Report

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
_TITLES = {"base": "base model", "uniform": "mixed adapters", "one": "one adapter"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("figures", __doc__)
    slug = describe_machine().slug
    compare, many = (RESULTS / f"{name}-{slug}.json" for name in ("compare", "many-adapters"))
    root.add_argument("--compare", type=Path, default=compare, help="of benchmarks.serve")
    root.add_argument("--many", type=Path, default=many, help="of benchmarks.many_adapters")
    root.add_argument("--output", type=Path, default=FIGURES, help="folder")
    return root


def throughput(report: Report) -> Figure:
    """Output tokens per second over clients: a panel for each popularity, a line for each peer."""
    found = [line for line in series(report.cells) if line.rates]
    kinds = list(dict.fromkeys(line.popularity for line in found))
    figure = Figure(figsize=(4 * len(kinds), 4.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    colours = _colours(report)
    for axes, kind in zip(panels, kinds, strict=True):
        for peer, colour in colours.items():
            lines = sorted(
                (line for line in found if (line.peer, line.popularity) == (peer, kind)),
                key=lambda line: line.num_clients,
            )
            if lines:
                _draw_line(axes, lines, peer, colour)
        _draw_limit(axes, report.limits, report.limit_weights)
        axes.set(title=_TITLES.get(kind, kind), xlabel="clients", xscale="log", yscale="log")
        clients = sorted({line.num_clients for line in found})
        axes.set_xticks(clients, [str(number) for number in clients])
        axes.xaxis.minorticks_off()
        _plain_ticks(axes)
    panels[0].set_ylabel("output tokens per second")
    _legend(figure, panels)
    return figure


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels: not every peer is in every panel."""
    named: dict[str, Artist] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5)


def _plain_ticks(axes: Axes) -> None:
    """Numbers such as 20 and 50 on a logarithmic axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, axis="y", alpha=0.3)


def _draw_line(axes: Axes, lines: Sequence[Series], peer: str, colour: str) -> None:
    clients = [line.num_clients for line in lines]
    rates = [line.tokens_per_s for line in lines]
    below = [line.tokens_per_s - min(line.rates.values()) for line in lines]
    above = [max(line.rates.values()) - line.tokens_per_s for line in lines]
    axes.errorbar(
        clients, rates, yerr=(below, above), label=peer, color=colour, marker="o", capsize=3
    )


def _draw_limit(axes: Axes, limits: Sequence[LimitCell], weights: str) -> None:
    rates: dict[int, list[float]] = {}
    for cell in limits:
        rates.setdefault(cell.limit.num_clients, []).append(cell.limit.tokens_per_s)
    if rates:
        clients = sorted(rates)
        means = [sum(rates[number]) / len(rates[number]) for number in clients]
        axes.plot(clients, means, "--", color="grey", label=f"machine limit, {weights}")


def latency(report: Report) -> Figure:
    """TTFT and TPOT of the mixed workload: dots at the medians, lines to the 95th percentiles."""
    found = [s for s in series(report.cells) if s.rates and s.popularity == "uniform"]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = _colours(report)
    for axes, name in zip(panels, ("ttft_s", "tpot_s"), strict=True):
        _draw_quantiles(axes, found, name, colours)
    panels[0].set(title="time to first token, mixed adapters", ylabel="ms")
    panels[1].set(title="time per output token, mixed adapters", ylabel="ms")
    _legend(figure, panels)
    return figure


def _draw_quantiles(
    axes: Axes, found: Sequence[Series], name: str, colours: Mapping[str, str]
) -> None:
    clients = sorted({line.num_clients for line in found})
    step = 0.7 / len(colours)
    for index, (peer, colour) in enumerate(colours.items()):
        lines = [line for line in found if line.peer == peer and getattr(line, name) is not None]
        places = [clients.index(line.num_clients) + (index + 0.5) * step - 0.35 for line in lines]
        p50 = [getattr(line, name).p50 * 1e3 for line in lines]
        above = [(getattr(line, name).p95 - getattr(line, name).p50) * 1e3 for line in lines]
        if lines:
            below = [0.0] * len(above)
            axes.errorbar(
                places, p50, yerr=(below, above), fmt="o", color=colour, label=peer, capsize=3
            )
    axes.set_xticks(range(len(clients)), map(str, clients))
    axes.set(xlabel="clients", yscale="log")
    _plain_ticks(axes)


def many(document: dict[str, Any]) -> Figure:
    """Output tokens per second and start-up over the number of adapters registered."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    cells = document["cells"]
    counts = sorted({cell["num_adapters"] for cell in cells})
    _draw_counts(left, cells, counts, lambda cell: cell["summary"]["tokens_per_s"])
    _draw_counts(right, cells, counts, lambda cell: cell["start_s"])
    left.set(title="output tokens per second", xlabel="adapters registered")
    right.set(title="start-up, seconds", xlabel="adapters registered")
    return figure


def _draw_counts(
    axes: Axes,
    cells: Sequence[dict[str, Any]],
    counts: Sequence[int],
    of: Callable[[dict[str, Any]], float],
) -> None:
    groups = [[of(cell) for cell in cells if cell["num_adapters"] == n] for n in counts]
    middle = [sum(group) / len(group) for group in groups]
    axes.plot(counts, middle, marker="o")
    for count, group in zip(counts, groups, strict=True):
        axes.plot([count] * len(group), group, ".", color="grey", alpha=0.6)
    axes.set(xscale="log", ylim=(0, 1.2 * max(map(max, groups))))
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()


def _colours(report: Report) -> dict[str, str]:
    """A colour for each peer, the same in all figures of a report."""
    peers = list(dict.fromkeys(cell.peer for cell in report.cells))
    colours = matplotlib.colormaps["tab10" if len(peers) <= 10 else "tab20"]
    return {peer: to_hex(colours(index % colours.N)) for index, peer in enumerate(peers)}


def save(figure: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on the figure alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    say(f"written: {path}")


def main() -> None:
    """Draw what there are results of; the rest is named."""
    options = parser().parse_args()
    if options.compare.is_file():
        with exit_with_reason("figures"):
            report = Report.read(options.compare)
        save(throughput(report), options.output / "bench-throughput.svg")
        save(latency(report), options.output / "bench-latency.svg")
    else:
        say(f"no results: {options.compare}")
    if options.many.is_file():
        document = json.loads(options.many.read_text(encoding="utf-8"))
        save(many(document), options.output / "bench-adapters.svg")
    else:
        say(f"no results: {options.many}")


if __name__ == "__main__":
    main()
