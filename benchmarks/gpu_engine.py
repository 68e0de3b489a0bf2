"""Decoding steps of this engine, timed by what the rows of a batch ask for."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.gpu_shapes import ModelShape, random_terms
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.engine.attention.paged import PAGE_SIZE
from dynamic_lora_server.engine.engine import Engine, FailedEvent
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.sequence import Phase
from dynamic_lora_server.engine.sequence import Sequence as Row
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.engine.startup.static_decoding import static_kernel
from dynamic_lora_server.generation import SamplingParams
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.modes.costs import StepCosts

PROMPT_TOKENS = 16
# A row's whole need in one page of the KV cache.
MAX_NEW_TOKENS = 200
WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the rows of a batch ask for, in turn; 0 adapters is the base model.

    With `resident` all adapters are on the device meanwhile; without `overlap` a
    step is read before the next one is started.
    """

    name: str
    num_adapters: int
    resident: bool = True
    mode: Mode = Mode.BYPASS
    overlap: bool = True


CELLS = (
    Cell(name="base", num_adapters=0, resident=False),
    Cell(name="base, one by one", num_adapters=0, resident=False, overlap=False),
    Cell(name="idle", num_adapters=0),
    Cell(name="merged", num_adapters=1, mode=Mode.MERGED),
    Cell(name="bypass 1", num_adapters=1),
    Cell(name="bypass 8", num_adapters=8),
    Cell(name="bypass 32", num_adapters=32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of one measurement."""

    rows: tuple[int, ...]
    num_rounds: int
    num_steps: int
    num_adapters: int
    kv_memory: int | None
    adapter_memory: int | None


class StepTime(NamedTuple):
    """Seconds of a step, and those of them that the host did not spend waiting for the device."""

    seconds: float
    host_s: float


Round = dict[tuple[str, int], StepTime]
"""What one round measured, by cell and rows."""


class StepBench:
    """An engine around a model of random weights, with `compiled` layers if asked for.

    Without `graphs` no step is captured.

    Raises InvalidParameter or UnsupportedModel where the engine cannot be had.
    """

    def __init__(
        self,
        shape: ModelShape,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compiled: bool = False,
        graphs: bool = True,
    ) -> None:
        self._plan = plan
        self.model = shape.build(device, dtype)
        self.built: BuiltEngine = build_engine(
            self.model,
            model_id=shape.name,
            options=EngineOptions(
                max_running=max(plan.rows),
                prefill_chunk=PROMPT_TOKENS * max(plan.rows),
                kv_memory=plan.kv_memory,
                adapter_memory=plan.adapter_memory,
                prefix_cache_memory=0,
                mode=Mode.BYPASS,
                compile_layers=compiled,
                decode_graphs=None if graphs else False,
            ),
        )
        self._terms: AdapterTerms = random_terms(self.built.geometry)
        self._adapters: list[ResidentAdapter] = []
        self._ids = count()
        self._digests = count()

    @property
    def weight_bytes(self) -> int:
        """What a step reads at the least: every weight that multiplies."""
        groups = self.built.groups
        return sum(g.in_features * g.out_features for g in groups) * self.model.dtype.itemsize

    @property
    def attention(self) -> str | None:
        """What attends in decoding steps of fixed shape; None if there are none."""
        runner = self.built.engine.runner
        if runner.graphs is None:
            return None
        kernel = static_kernel(self.model.device, self.model.dtype, runner.head_dim)
        return getattr(kernel, "__name__", repr(kernel))

    def rounds(self, out_of_time: Callable[[], bool]) -> Iterator[Round]:
        """Steps by cell and rows, round by round; cells take turns.

        The adapters come and go in every round, so that the base model is
        measured without any beside every other cell. Asked between two cells whether it is
        `out_of_time`, but not before the first, it leaves out the rest.
        """
        for _ in range(self._plan.num_rounds):
            self._drop_all()
            found: Round = {}
            for cell, rows in self._turns():
                if found and out_of_time():
                    break
                if cell.resident:
                    self._admit_all()
                found[cell.name, rows] = self._step_time(cell, rows)
            yield found
            if out_of_time():
                break

    def left_out(self, rounds: Sequence[Round]) -> list[str]:
        """The cells that no round had time for."""
        measured = {key for found in rounds for key in found}
        return [
            f"{cell.name}, {rows} rows"
            for cell, rows in self._turns()
            if (cell.name, rows) not in measured
        ]

    def _turns(self) -> Iterator[tuple[Cell, int]]:
        fitting = [rows for rows in self._plan.rows if self._fits(rows)]
        return ((cell, rows) for cell in CELLS for rows in fitting)

    def kernel_table(self) -> list[dict[str, Any]]:
        """Microseconds a step of every delta kernel, as the engine measured them at start."""
        points: dict[tuple[int, int], dict[str, float]] = {}
        for name, measured in self.built.engine.runner.chooser.costs.seconds.items():
            for point, seconds in measured.items():
                points.setdefault(point, {})[name] = round(seconds * 1e6, 2)
        return [
            {"adapters": adapters, "rows_each": length, "best": min(us, key=us.__getitem__)} | us
            for (adapters, length), us in sorted(points.items())
        ]

    def graphs(self) -> dict[str, Any] | None:
        """How many steps were replayed and declined; None without CUDA graphs."""
        graphs = self.built.engine.runner.graphs
        if graphs is None:
            return None
        stats = graphs.stats()
        return {"replayed": stats.num_replayed, "declined": dict(stats.num_declined)}

    def _fits(self, rows: int) -> bool:
        return self.built.space.num_cells >= rows * PAGE_SIZE

    def _admit_all(self) -> None:
        while len(self._adapters) < self._plan.num_adapters:
            digest = f"{next(self._digests):064x}"
            adapter = self.built.pool.admit(digest, self._terms)
            if adapter is None:
                raise BenchmarkError(f"no memory for {self._plan.num_adapters} adapters")
            self._adapters.append(adapter)

    def _drop_all(self) -> None:
        self.built.modes.make_room()
        for adapter in self._adapters:
            self.built.pool.drop(adapter.digest)
            self.built.pool.release(adapter)
        self._adapters.clear()

    def _step_time(self, cell: Cell, num_rows: int) -> StepTime:
        """The median of several decoding steps, sampling and reading back included."""
        built = self.built
        runner, pool = built.engine.runner, built.pool
        modes = ModeController(StepCosts.never_merging(), cell.mode, runner.merger, pool)
        engine = Engine(built.engine.scheduler, runner, modes, overlap=cell.overlap)
        rows = [self._row(cell, number) for number in range(num_rows)]
        for row in rows:
            engine.add(row)
        while any(row.phase is not Phase.DECODE for row in rows):
            _step(engine)
        steps = [_step(engine) for _ in range(WARM_UP_STEPS + self._plan.num_steps)]
        for row in rows:
            engine.cancel(row)
        while engine.has_work:
            _step(engine)
        if (runner.merger.merged is None) != (cell.mode is not Mode.MERGED):
            raise BenchmarkError(f"{cell.name} was not served as it should be")
        seconds, host_s = zip(*steps[WARM_UP_STEPS:], strict=True)
        return StepTime(statistics.median(seconds), statistics.median(host_s))

    def _row(self, cell: Cell, number: int) -> Row:
        rng = random.Random(number)
        vocab = int(self.model.config.vocab_size)
        chosen = self._adapters[number % cell.num_adapters] if cell.num_adapters else None
        return Row(
            id=next(self._ids),
            prompt_ids=tuple(rng.randrange(3, vocab) for _ in range(PROMPT_TOKENS)),
            sampling=SamplingParams(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True),
            stop_ids=frozenset(),
            seed=0,
            adapter=chosen,
        )


def _step(engine: Engine) -> StepTime:
    begin, waited_s = time.perf_counter(), engine.waited_s
    events = engine.step()
    seconds = time.perf_counter() - begin
    for event in events:
        if isinstance(event, FailedEvent):
            raise BenchmarkError(event.message)
    return StepTime(seconds, seconds - (engine.waited_s - waited_s))


def table(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Per cell and rows: the median step, and the median over rounds of its ratio to base.

    Over the rounds that had time for it.
    """
    cells = []
    for cell, rows in rounds[0]:
        having = [found for found in rounds if (cell, rows) in found]
        steps = [found[cell, rows].seconds for found in having]
        hosts = [found[cell, rows].host_s for found in having]
        ratios = [found["base", rows].seconds / found[cell, rows].seconds for found in having]
        cells.append(
            {
                "cell": cell,
                "rows": rows,
                "step_ms": round(statistics.median(steps) * 1e3, 4),
                "host_ms": round(statistics.median(hosts) * 1e3, 4),
                "tokens_per_s": round(rows / statistics.median(steps), 1),
                "of_base": round(statistics.median(ratios), 4),
            }
        )
    return cells
