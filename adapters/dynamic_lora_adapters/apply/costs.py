"""Which delta kernel is fastest for the run at hand, by measurement.

At start-up each kernel is timed on the model's own layer shapes over a grid
of adapter counts and segment lengths. A run is then looked up at the nearest
grid point; a padding kernel is charged for its longest segment, the others
for the mean.
"""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from dynamic_lora_adapters.device.groups import PROBE_RANK, GroupShape, ProjectionGroup
from dynamic_lora_adapters.device.slab_layout import SlabLayout
from dynamic_lora_adapters.kernels import KERNELS, DeltaKernel, compiled_ahead, kernels_for
from dynamic_lora_adapters.kernels.factor_layout import layout_for
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.segments import DeltaPlan, Run

NUM_ADAPTERS_GRID = (1, 2, 4, 8, 16, 32)
LENGTH_GRID = (1, 2, 4, 8, 32, 128)
MAX_ROWS = 256
MAX_SECONDS = 5.0  # what is not timed by then is taken from the nearest point that was
_SAMPLES = 5
_COLD_BYTES = 2**27  # more than a processor's last cache holds
_HOPELESS = 4.0  # a kernel this many times slower than the best is not timed further

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class KernelCosts:
    """Seconds per step of each kernel at (number of adapters, rows per adapter).

    A kernel that fell far behind at some length has no points beyond it.
    """

    seconds: Mapping[str, Mapping[Point, float]]

    def of(self, name: str, num_adapters: int, length: float) -> float:
        """Measured seconds at the grid point nearest on a logarithmic scale."""
        points = self.seconds[name]
        nearest = min(points, key=lambda point: _distance(point, num_adapters, length))
        # Beyond the grid cost grows with the number of rows.
        grown = (num_adapters * length) / (nearest[0] * nearest[1])
        return points[nearest] * max(grown, 1.0)

    @property
    def whole(self) -> bool:
        """Whether some kernel was measured at every point of the grid."""
        found = {point for points in self.seconds.values() for point in points}
        return all(point in found for point in grid())

    def to_json(self) -> str:
        """The table as text, for a cache between starts."""
        rows = [[name, *point, s] for name, t in self.seconds.items() for point, s in t.items()]
        return json.dumps(rows)

    @classmethod
    def from_json(cls, text: str, names: Collection[str] = KERNELS) -> "KernelCosts":
        """Read what `to_json` wrote for the kernels `names`; ValueError for anything else."""
        table: dict[str, dict[Point, float]] = {}
        for name, adapters, length, seconds in json.loads(text):
            table.setdefault(str(name), {})[int(adapters), int(length)] = float(seconds)
        if set(table) != set(names) or any((1, 1) not in points for points in table.values()):
            raise ValueError("the cached kernel costs are of another version")
        return cls(table)


class KernelChooser:
    """Names the kernel of every run of a plan."""

    def __init__(self, costs: KernelCosts, kernels: Mapping[str, DeltaKernel] = KERNELS) -> None:
        self._costs = costs
        self._kernels = kernels
        # Steps repeat, and this is asked before each.
        self._fastest = lru_cache(maxsize=1024)(self._find)

    @property
    def costs(self) -> KernelCosts:
        """What it chooses by."""
        return self._costs

    @property
    def reads_mixed(self) -> bool:
        """Whether factors may be in another dtype than inputs are."""
        return NativeSegments.name in self._kernels

    def choose(self, run: Run) -> DeltaKernel:
        """The kernel with the least measured cost for this run, of those that read its factors."""
        if run.slab.mixed:
            return self._kernels[NativeSegments.name]
        longest = run.num_rows / run.num_slots if run.uniform else run.max_length
        return self._fastest(run.num_slots, run.num_rows, longest)

    def _find(self, num_adapters: int, num_rows: int, longest: float) -> DeltaKernel:
        def cost(name: str) -> float:
            length = longest if self._kernels[name].pads else num_rows / num_adapters
            return self._costs.of(name, num_adapters, length)

        return self._kernels[min(self._kernels, key=cost)]

    def assign(self, plan: DeltaPlan) -> DeltaPlan:
        """Set the kernel of each run of `plan` and return it."""
        for run in plan.runs:
            run.kernel = self.choose(run)
        return plan


def group_kernels(
    groups: Sequence[ProjectionGroup],
    *,
    device: torch.device,
    dtype: torch.dtype,
    native: bool = True,
    factor_dtype: torch.dtype | None = None,
) -> dict[str, DeltaKernel]:
    """The kernels that run on all of these groups, by name; without `native` none in C++.

    As `kernels_for` has them, and `compiled_ahead`; factors are kept in `factor_dtype`, or in
    `dtype`.
    """
    shapes = [(g.in_features, g.out_features) for g in groups]
    widths = [width for shape in shapes for width in shape]
    found = kernels_for(device, dtype, widths, native=native, factor_dtype=factor_dtype)
    return compiled_ahead(found, shapes, device, dtype)


def grid() -> Iterator[Point]:
    """The points at which kernels are timed."""
    points = itertools.product(NUM_ADAPTERS_GRID, LENGTH_GRID)
    return (point for point in points if _on_grid(*point))


def _on_grid(num_adapters: int, length: int) -> bool:
    return num_adapters * length <= MAX_ROWS


def measure_costs(
    groups: Sequence[ProjectionGroup],
    kernels: Mapping[str, DeltaKernel],
    *,
    device: torch.device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
) -> KernelCosts:
    """Time every kernel over the grid.

    Factors are in `factor_dtype`, or in `dtype` as inputs are.

    Takes a second or two for a small model on a CPU, and beyond what kernels take to be
    compiled MAX_SECONDS at most.
    """
    bench = _Bench(groups, device, dtype, factor_dtype)
    seconds: dict[str, dict[Point, float]] = {name: {} for name in kernels}
    # The first call of a kernel may compile it, and that of a long segment another tile of it.
    for kernel, length in itertools.product(kernels.values(), (1, max(LENGTH_GRID))):
        bench.time(kernel, 1, length, samples=1)
    deadline = time.monotonic() + MAX_SECONDS
    for num_adapters in NUM_ADAPTERS_GRID:
        contenders = dict(kernels)
        for length in LENGTH_GRID:
            point = (num_adapters, length)
            if not _on_grid(*point):
                continue
            if time.monotonic() > deadline and point != (1, 1):
                continue
            for name, kernel in contenders.items():
                seconds[name][point] = bench.time(kernel, *point)
            contenders = _within_reach(contenders, seconds, point)
    return KernelCosts(seconds)


def _within_reach(
    contenders: Mapping[str, DeltaKernel],
    seconds: Mapping[str, Mapping[Point, float]],
    point: Point,
) -> dict[str, DeltaKernel]:
    """The kernels worth timing on longer segments: those not far behind at this point."""
    best = min(seconds[name][point] for name in contenders)
    return {
        name: kernel
        for name, kernel in contenders.items()
        if seconds[name][point] <= _HOPELESS * best
    }


class _Bench:
    """Random tables of the model's distinct group shapes, weighted by how often they occur."""

    def __init__(
        self,
        groups: Sequence[ProjectionGroup],
        device: torch.device,
        dtype: torch.dtype,
        factor_dtype: torch.dtype | None,
    ) -> None:
        self._device = device
        self._dtype = dtype
        layers = [group for group in groups if not group.is_head]
        shapes = Counter((g.in_features, g.widths) for g in layers)
        self._weights = list(shapes.values())
        self._groups = [ProjectionGroup((), *shape) for shape in shapes]
        signature = tuple(GroupShape(PROBE_RANK * len(g.widths)) for g in self._groups)
        layout = SlabLayout(
            self._groups,
            device=device,
            dtype=dtype,
            factor_dtype=factor_dtype or dtype,
            layout=layout_for(device, factor_dtype),
            num_slots=0,
        )
        slots = self._num_slots(layout.slot_bytes(signature))
        self._next_slot = 0
        self._slab = layout.new_slab(0, signature, slots)
        for table in (*self._slab.a, *self._slab.b):
            assert table is not None
            if table.is_floating_point():
                table.normal_()
            else:
                table.fill_(1)  # tiny scales, too
        for columns, group in zip(self._slab.columns, self._groups, strict=True):
            assert columns is not None
            columns.copy_(_columns(slots, group.widths))

    def time(
        self, kernel: DeltaKernel, num_adapters: int, length: int, samples: int = _SAMPLES
    ) -> float:
        """The least of several runs: what disturbs a measurement only ever adds to it."""
        rows = num_adapters * length
        inputs = [self._random(rows, group.in_features) for group in self._groups]
        outputs = [self._random(rows, group.out_features) for group in self._groups]
        prepared = Run(self._slab, self._cold_slots(num_adapters), 0, [length] * num_adapters)
        # A step makes a run's index tensors once, for all of its layers.
        self._seconds(kernel, 0, prepared, inputs, outputs)
        best = math.inf
        for _ in range(samples):
            run = replace(prepared, slot_start=self._cold_slots(num_adapters))
            best = min(best, self._once(kernel, run, inputs, outputs))
        return best

    def _num_slots(self, slot_bytes: int) -> int:
        """So many that factors come from memory, if they do so in a step over all layers."""
        wanted = -(-_COLD_BYTES // max(slot_bytes, 1))
        fewest = max(NUM_ADAPTERS_GRID)
        return min(max(wanted, fewest), fewest * max(self._weights, default=1))

    def _cold_slots(self, count: int) -> int:
        """The first of the neighbouring slots whose turn it is."""
        if self._next_slot + count > len(self._slab.tenants):
            self._next_slot = 0
        first = self._next_slot
        self._next_slot += count
        return first

    def _once(
        self,
        kernel: DeltaKernel,
        run: Run,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> float:
        return sum(
            weight * self._seconds(kernel, index, run, inputs, outputs)
            for index, weight in enumerate(self._weights)
        )

    def _seconds(
        self,
        kernel: DeltaKernel,
        index: int,
        run: Run,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> float:
        """How long one group takes."""
        factors = self._slab.factors(index, run.slots)
        assert factors is not None
        self._synchronise()
        begin = time.perf_counter()
        kernel(outputs[index], inputs[index], factors, run)
        self._synchronise()
        return time.perf_counter() - begin

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _columns(num_slots: int, widths: Sequence[int]) -> torch.Tensor:
    """Where rows of b are not zero if every member of a group has the probe's rank."""
    stops = torch.tensor(widths).cumsum(0)
    members = torch.stack([stops - torch.tensor(widths), stops], dim=1)
    return members.repeat_interleave(PROBE_RANK, 0).repeat(num_slots, 1, 1)


def _distance(point: Point, num_adapters: int, length: float) -> float:
    return abs(math.log2(point[0] / num_adapters)) + abs(math.log2(point[1] / length))
