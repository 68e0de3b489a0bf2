"""Many adapters under one server: throughput, start-up and memory over how many there are.

    python -m benchmarks.many_adapters

For each number of adapters there is a home, filled through `POST /adapters`. In every round each
home is served in turn: start-up is timed, memory read, and one closed loop run whose requests
spread over all of the home's adapters by Zipf's law. The homes stay in the cache until the run
has ended well, so that a run that was broken off does not upload again.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import httpx
import uvloop
from platformdirs import user_cache_path

from benchmarks.command import RESULTS, command, counts, exit_with_reason, say, write_json
from benchmarks.load import TIMEOUT_S, connect, measure
from benchmarks.machine import describe_machine
from benchmarks.peers.adapters import halved, make_adapters, with_other_values
from benchmarks.peers.dynamic_lora import FILES, NO_DRAFTS, post_adapter, serving
from benchmarks.peers.process import end_on_sigterm
from benchmarks.report import spread, table
from benchmarks.stats import Summary
from benchmarks.wire import DynamicLoraWire
from benchmarks.workload import Popularity, PromptMaker, Request, Workload, requests

_HEADER = ("adapters", "tok/s", "of the first", "TTFT p50 / p95 ms", "start-up s", "memory MiB")
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One home, served once. Memory is resident, in bytes: after start, and after the load."""

    num_adapters: int
    round: int
    start_s: float
    idle_bytes: int
    loaded_bytes: int
    summary: Summary


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("many_adapters", __doc__)
    root.add_argument("--counts", type=_ascending, default=[8, 100, 1000, 5000])
    root.add_argument("--exponent", type=float, default=1.0, help="of the Zipf distribution")
    root.add_argument("--clients", type=int, default=32)
    root.add_argument("--requests", type=int, default=96, help="per cell")
    root.add_argument("--rounds", type=int, default=2)
    # 5,000 adapters of rank 16 on all layers are 50 GB: these are 0.5 MB each.
    root.add_argument("--rank", type=int, default=4)
    root.add_argument("--modules", type=_words, default=["q_proj", "v_proj"])
    memory = "for adapters on the device; the default holds a few hundred"
    root.add_argument("--adapter-memory", default="512MiB", help=memory)
    root.add_argument("--base", help="base model: folder or Hub id (default: the embedded one)")
    cache = user_cache_path("dynamic-lora") / "benchmarks"
    root.add_argument("--cache", type=Path, default=cache, help="where the homes are made")
    root.add_argument("--keep", action="store_true", help="keep the homes at the end")
    root.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    return root


def _ascending(text: str) -> list[int]:
    return sorted(set(counts(text)))


def _words(text: str) -> list[str]:
    return text.split(",")


def adapter_names(num_adapters: int) -> list[str]:
    """What the adapters are called, the most popular first."""
    return [f"many-{index:05d}" for index in range(num_adapters)]


class Homes:
    """A home for each number of adapters; the larger grow out of the smaller."""

    def __init__(self, options: argparse.Namespace, base: Path) -> None:
        self._options = options
        self._base = base
        modules = "-".join(options.modules)
        self.folder: Path = options.cache / f"many-adapters-r{options.rank}-{modules}"
        self._growing = self.folder / "growing"
        self.log = options.cache / "logs" / "many-adapters.log"

    def path(self, num_adapters: int) -> Path:
        """The home with so many adapters."""
        return self.folder / str(num_adapters)

    def make(self) -> None:
        """Make what is missing. Raises PeerUnavailable where an upload is refused."""
        missing = [n for n in self._options.counts if not self.path(n).is_dir()]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            [made] = make_adapters(
                self._base,
                Path(scratch),
                num_adapters=1,
                rank=self._options.rank,
                target_modules=self._options.modules,
            )
            config, weights = (made / FILES[0]).read_bytes(), halved(made / FILES[1])
        for num_adapters in missing:
            self._grow(num_adapters, config, weights)
            part = self.folder / f"{num_adapters}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self._growing, part)
            part.rename(self.path(num_adapters))

    def _grow(self, num_adapters: int, config: bytes, weights: bytes) -> None:
        names = adapter_names(num_adapters)
        say(f"uploading up to {num_adapters} adapters of {len(weights) / 1e6:.2f} MB")
        with (
            serving(self._base, self._growing, self.log, flags(self._options)) as (url, _),
            httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http,
        ):
            present = {entry["name"] for entry in http.get("/adapters").json()["adapters"]}
            began, num_sent = time.perf_counter(), 0
            for index, name in enumerate(names):
                if name in present:
                    continue
                files = zip(FILES, (config, with_other_values(weights, index)), strict=True)
                post_adapter(http, name, dict(files))
                num_sent += 1
                if num_sent % 500 == 0:
                    rate = num_sent / (time.perf_counter() - began)
                    say(f"  {index + 1} of {num_adapters}, {rate:.0f} a second")


def flags(options: argparse.Namespace) -> tuple[str, ...]:
    """The options of `serve`."""
    return (*NO_DRAFTS, "--adapter-memory", options.adapter_memory)


def warm_up(workload: Workload, prompts: PromptMaker) -> list[Request]:
    """Short requests, two for each client, that spread over the adapters as the cell's do."""
    short = replace(workload, seed=workload.seed + 1000, num_output_tokens=_WARM_UP_TOKENS)
    return list(islice(requests(short, prompts), 2 * workload.num_clients))


def run_cell(
    options: argparse.Namespace,
    base: Path,
    homes: Homes,
    where: tuple[int, int],
    prompts: PromptMaker,
) -> Cell:
    """Serve one home (`where`: its adapters, the round) and run its closed loop.

    Raises BenchmarkError.
    """
    num_adapters, number = where
    workload = Workload(
        num_clients=options.clients,
        popularity=Popularity("zipf", options.exponent),
        num_adapters=num_adapters,
        num_requests=options.requests,
        seed=number,
    )
    wire = DynamicLoraWire(adapter_names(num_adapters))
    began = time.perf_counter()
    with serving(base, homes.path(num_adapters), homes.log, flags(options)) as (url, process):
        start_s = time.perf_counter() - began
        idle_bytes = process.resident_bytes()
        summary = uvloop.run(_measure(url, wire, workload, prompts))
        return Cell(
            num_adapters=num_adapters,
            round=number,
            start_s=start_s,
            idle_bytes=idle_bytes,
            loaded_bytes=process.resident_bytes(),
            summary=summary,
        )


async def _measure(
    url: str, wire: DynamicLoraWire, workload: Workload, prompts: PromptMaker
) -> Summary:
    async with connect(url) as http:
        return await measure(http, wire, workload, prompts, warm_up=warm_up(workload, prompts))


def relative_rates(cells: Sequence[Cell]) -> dict[int, list[float]]:
    """Tokens per second over those of the smallest home in the same round, by home."""
    rates = {(cell.num_adapters, cell.round): cell.summary.tokens_per_s for cell in cells}
    first = min(number for number, _ in rates)
    shares: dict[int, list[float]] = {}
    for (num_adapters, number), rate in sorted(rates.items()):
        if (first, number) in rates:
            shares.setdefault(num_adapters, []).append(rate / rates[first, number])
    return shares


def to_markdown(cells: Sequence[Cell], settings: str) -> str:
    """The table, and what it was measured with."""
    rows = []
    for num_adapters, shares in relative_rates(cells).items():
        found = [cell for cell in cells if cell.num_adapters == num_adapters]
        ttft = [cell.summary.ttft_s for cell in found]
        p50, p95 = (statistics.median(getattr(q, name) for q in ttft) for name in ("p50", "p95"))
        idle, loaded = (
            statistics.median(getattr(cell, name) for cell in found) / 2**20
            for name in ("idle_bytes", "loaded_bytes")
        )
        rows.append(
            [
                f"{num_adapters:,}",
                spread([cell.summary.tokens_per_s for cell in found], 1),
                spread(shares, 2),
                f"{p50 * 1e3:.0f} / {p95 * 1e3:.0f}",
                spread([cell.start_s for cell in found], 1),
                f"{idle:.0f}, under load {loaded:.0f}",
            ]
        )
    return "\n".join([*table(_HEADER, rows), "", settings])


def run(options: argparse.Namespace) -> None:
    """Make the homes, measure, print the table, write the JSON. Raises BenchmarkError."""
    from transformers import AutoTokenizer

    from dynamic_lora_server.base.base_model import resolve_base

    base = resolve_base(options.base).path
    options.cache = options.cache.resolve()
    machine = describe_machine()
    output = options.output or RESULTS / f"many-adapters-{machine.slug}.json"
    homes = Homes(options, base)
    homes.make()
    prompts = PromptMaker(AutoTokenizer.from_pretrained(base), 64)
    cells: list[Cell] = []
    for number in range(options.rounds):
        for count in options.counts if number % 2 == 0 else reversed(options.counts):
            cells.append(run_cell(options, base, homes, (count, number), prompts))
            rate = cells[-1].summary.tokens_per_s
            say(f"round {number + 1} of {options.rounds}: {count} adapters: {rate:.1f} tok/s")
            _write(output, asdict(machine), options, cells)
    say(f"written: {output}")
    if not options.keep:
        shutil.rmtree(homes.folder)
    print(to_markdown(cells, _settings(options)))


def _settings(options: argparse.Namespace) -> str:
    modules = ", ".join(options.modules)
    return (
        f"{options.clients} clients, {options.requests} requests a cell, 64 tokens in and out, "
        f"zipf:{options.exponent:g} over all adapters; rank {options.rank} on {modules}, float16; "
        f"--adapter-memory {options.adapter_memory}"
    )


def _write(
    output: Path, machine: dict[str, object], options: argparse.Namespace, cells: list[Cell]
) -> None:
    document = {
        "machine": machine,
        "settings": _settings(options),
        "relative": {n: statistics.median(s) for n, s in relative_rates(cells).items()},
        "cells": [asdict(cell) for cell in cells],
    }
    write_json(document, output)


def main() -> None:
    """Run the command."""
    end_on_sigterm()
    with exit_with_reason("many_adapters"):
        run(parser().parse_args())


if __name__ == "__main__":
    main()
