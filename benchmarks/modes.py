"""Two speeds on the real engine: base, bypass, merged, the automatic choice, and draining.

Runs the engine in this process, without HTTP, so that the modes alone differ.
Every cell is a closed loop of `--clients` sequences; cells take turns, round
by round, and the median of a cell's rounds is reported.

    python -m benchmarks.modes --output benchmarks/results/modes-cpu.json
"""

import argparse
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.command import command, write_json
from benchmarks.machine import describe_machine
from benchmarks.simulation.strategies import DrainAndMerge
from dynamic_lora_adapters.apply.costs import group_kernels
from dynamic_lora_adapters.apply.merge import Merger
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.base.base_model import resolve_base
from dynamic_lora_server.engine.decoder.trial import decode_trial
from dynamic_lora_server.engine.engine import Engine
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.scheduler import Piece, Scheduler
from dynamic_lora_server.engine.sequence import Sequence as Row
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.engine.startup.costs import startup_costs
from dynamic_lora_server.generation import SamplingParams
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.noop import noop

Pick = Callable[[random.Random], int | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table: who asks for what, and how it is served."""

    name: str
    pick: Pick
    mode: Mode | None  # None: drain and merge, as dLoRA does it


def base(_: random.Random) -> int | None:
    """Nobody asks for an adapter."""
    return None


def uniform(num_adapters: int) -> Pick:
    """All adapters are asked for alike."""
    return lambda rng: rng.randrange(num_adapters)


def zipf(exponent: float, num_adapters: int) -> Pick:
    """The k-th adapter is asked for k ** -exponent as often as the first."""
    weights = [(rank + 1) ** -exponent for rank in range(num_adapters)]
    return lambda rng: rng.choices(range(num_adapters), weights)[0]


CELLS = (
    Cell("base", base, Mode.BYPASS),
    Cell("1 adapter, merged", uniform(1), Mode.MERGED),
    Cell("1 adapter, auto", uniform(1), Mode.AUTO),
    Cell("1 adapter, bypass", uniform(1), Mode.BYPASS),
    Cell("2 mixed, bypass", uniform(2), Mode.BYPASS),
    Cell("8 mixed, bypass", uniform(8), Mode.BYPASS),
    Cell("8 mixed, auto", uniform(8), Mode.AUTO),
    Cell("32 mixed, bypass", uniform(32), Mode.BYPASS),
    Cell("Zipf(1.5) of 8, bypass", zipf(1.5, 8), Mode.BYPASS),
    Cell("Zipf(1.5) of 8, auto", zipf(1.5, 8), Mode.AUTO),
    Cell("Zipf(1.5) of 8, drain and merge", zipf(1.5, 8), None),
)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sequence as `DrainAndMerge` looks at it."""

    adapter: str | None


class _DrainScheduler(Scheduler):
    """Runs only the merged adapter's sequences while one is merged."""

    strategy: DrainAndMerge
    clients: int

    def schedule(self) -> list[Piece]:
        pieces = super().schedule()
        jobs = [_Waiting(piece.sequence.adapter_digest) for piece in pieces]
        chosen = {id(job) for job in self.strategy.select(jobs, self.clients)}  # type: ignore[arg-type]
        return [piece for piece, job in zip(pieces, jobs, strict=True) if id(job) in chosen]


class _DrainController(ModeController):
    """Merges what the strategy has decided."""

    strategy: DrainAndMerge
    merger: Merger

    def before_step(
        self, pieces: Sequence[Piece], requests: object, before_compute: Callable[[], object] = noop
    ) -> None:
        del requests, before_compute
        wanted = self.strategy.choose(None, 0.0)  # type: ignore[arg-type]
        adapters = (piece.sequence.adapter for piece in pieces)
        present = {adapter.digest: adapter for adapter in adapters if adapter is not None}
        if wanted is None or wanted in present:
            self._switch(None if wanted is None else present[wanted])


class Bench:
    """The engine on the real base with random adapters of rank 16 on all linear layers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        path = resolve_base(arguments.model).path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.options = EngineOptions(kv_memory=2**30, adapter_memory=2**32, mode=Mode.BYPASS)
        self.built: BuiltEngine = build_engine(
            self.model, model_id=arguments.model or "default", options=self.options
        )
        runner = self.built.engine.runner
        self.merger = runner.merger
        device, dtype = self.model.device, self.model.dtype
        self.costs = startup_costs(
            self.built.groups,
            group_kernels(self.built.groups, device=device, dtype=dtype),
            self.merger,
            decode_trial(self.model, runner.cache, runner.decoder),
            device=device,
            dtype=dtype,
            merges=True,
            drafts=False,
            file=None,
            on_step=lambda _: None,
        ).steps
        self.adapters: list[ResidentAdapter] = []
        self._num_rows = 0

    def admit(self, num_adapters: int) -> None:
        """Bring adapters to the device until there are so many."""
        while len(self.adapters) < num_adapters:
            seed = len(self.adapters)
            adapter = self.built.pool.admit(f"{seed:064x}", self._terms(seed))
            assert adapter is not None
            self.adapters.append(adapter)

    def _terms(self, seed: int) -> AdapterTerms:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 0.02

        linears = {
            path: LinearTerms(a=draw(16, shape.in_features), b=draw(shape.out_features, 16))
            for path, shape in self.built.geometry.linears.items()
        }
        return AdapterTerms(linears=linears)

    def run(self, cell: Cell, seed: int) -> tuple[float, int]:
        """Output tokens per second of one closed loop, and the switches made."""
        engine = self._engine(cell)
        rng = random.Random(seed)
        waiting = deque(self._row(cell, rng) for _ in range(self.arguments.requests))
        num_tokens = len(waiting) * self.arguments.output_tokens
        begin = time.perf_counter()
        while waiting or engine.has_work:
            while waiting and engine.scheduler.num_running < self.arguments.clients:
                engine.add(waiting.popleft())
                if engine.scheduler.num_waiting >= self.arguments.clients:
                    break
            engine.step()
        seconds = time.perf_counter() - begin
        num_switches = engine.modes.stats().num_switches
        engine.modes.make_room()
        return num_tokens / seconds, num_switches

    def _engine(self, cell: Cell) -> Engine:
        scheduler_type = Scheduler if cell.mode is not None else _DrainScheduler
        scheduler = scheduler_type(
            self.built.space,
            max_running=self.arguments.clients,
            prefill_chunk=self.options.prefill_chunk,
        )
        controller_type = ModeController if cell.mode is not None else _DrainController
        controller = controller_type(
            self.costs, cell.mode or Mode.BYPASS, self.merger, self.built.pool
        )
        if isinstance(scheduler, _DrainScheduler) and isinstance(controller, _DrainController):
            strategy = DrainAndMerge(self.costs, max_running=self.arguments.clients, num_adapters=8)
            scheduler.strategy = controller.strategy = strategy
            scheduler.clients = self.arguments.clients
        return Engine(scheduler, self.built.engine.runner, controller)

    def _row(self, cell: Cell, rng: random.Random) -> Row:
        chosen = cell.pick(rng)
        self._num_rows += 1
        return Row(
            id=self._num_rows,
            prompt_ids=tuple(
                rng.randrange(100, 40_000) for _ in range(self.arguments.prompt_tokens)
            ),
            sampling=SamplingParams(max_new_tokens=self.arguments.output_tokens, ignore_eos=True),
            stop_ids=frozenset(),
            seed=0,
            adapter=None if chosen is None else self.adapters[chosen],
        )


def measure(bench: Bench, rounds: int) -> list[dict[str, object]]:
    """All cells, round by round; idle adapters come before the others are admitted."""
    speeds: dict[str, list[float]] = {}
    switches: dict[str, int] = {}
    bare = Cell("base, no adapter loaded", base, Mode.BYPASS)
    speeds[bare.name] = [bench.run(bare, seed)[0] for seed in range(rounds)]
    bench.admit(32)
    order = [(number, cell) for number in range(rounds) for cell in CELLS]
    for number, cell in track(order, "Measuring", console=Console(stderr=True)):
        speed, switches[cell.name] = bench.run(cell, number)
        speeds.setdefault(cell.name, []).append(speed)
    base_speed = statistics.median(speeds["base"])
    return [
        {
            "cell": name,
            "tokens_per_s": round(statistics.median(found), 1),
            "of_base": round(statistics.median(found) / base_speed, 3),
            "switches": switches.get(name, 0),
            "rounds": [round(speed, 1) for speed in found],
        }
        for name, found in speeds.items()
    ]


def main() -> None:
    """Measure, print a table, and write it with the machine's description."""
    parser = command("modes", __doc__)
    parser.add_argument("--model", help="base model; by default the embedded one")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    cells = measure(bench, arguments.rounds)
    table = Table("", "tok/s", "of base", "switches")
    for cell in cells:
        table.add_row(*(str(cell[key]) for key in ("cell", "tokens_per_s", "of_base", "switches")))
    Console().print(table)
    if arguments.output:
        document = {
            "machine": asdict(describe_machine()),
            "costs": json.loads(bench.costs.to_json()),
            "cells": cells,
        }
        write_json(document, arguments.output)


if __name__ == "__main__":
    main()
