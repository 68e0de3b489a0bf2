"""Fixed costs of kernels, steps and switches, in the place of what engines measure at start.

What is measured depends on what else the machine does, and with it which kernel serves and
whether adapters are merged.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from dynamic_lora_adapters.apply.costs import KernelCosts, grid, measure_costs
from dynamic_lora_server.engine.startup import costs as startup_costs
from dynamic_lora_server.engine.startup.mode_costs import measure_mode_costs
from dynamic_lora_server.modes.costs import StepCosts

# Seconds of a step, and of each adapter and each row in it. The C++ is fastest, as it is when
# measured; of the others each is fastest for some number of adapters.
_SECONDS = {
    "native_segments": (1e-5, 1e-6),
    "triton_segments": (2e-5, 1e-6),
    "grouped_gemm": (9e-5, 3e-6),
    "segment_loop": (0.0, 3e-5),
    "rank_concat": (4e-5, 1.5e-5),
    "sorted_groups": (8e-5, 5e-6),
}
_ROW_SECONDS = 1e-7
STEPS = StepCosts(
    base=((1, 0.010), (8, 0.012), (32, 0.020), (128, 0.060)),
    deltas=((1, ((1, 0.001), (128, 0.004))), (8, ((8, 0.004), (128, 0.010)))),
    switch_s=60.0,
)
"""Drafts of a few tokens pay, and no test takes so many steps that a merge does."""


def kernel_costs(kernels: Mapping[str, object], cheapest: str | None = None) -> KernelCosts:
    """Costs of these kernels; the `cheapest` one, if any, costs nothing."""

    def seconds(name: str, num_adapters: int, length: int) -> float:
        once, each = _SECONDS[name]
        return once + num_adapters * (each + length * _ROW_SECONDS)

    return KernelCosts(
        {
            name: {point: 0.0 if name == cheapest else seconds(name, *point) for point in grid()}
            for name in kernels
        }
    )


@contextmanager
def fixed_costs(cheapest: str | None = None) -> Iterator[None]:
    """Engines that are built meanwhile take their costs from here."""

    def kernels(_groups: object, kernels: Mapping[str, object], **_: Any) -> KernelCosts:
        return kernel_costs(kernels, cheapest)

    def steps(*_: object, merges: bool = True, **__: object) -> StepCosts:
        return STEPS if merges else replace(STEPS, switch_s=math.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup_costs, "measure_costs", kernels)
        patch.setattr(startup_costs, "measure_mode_costs", steps)
        yield


@contextmanager
def measured_costs() -> Iterator[None]:
    """Engines that are built meanwhile measure, as a server does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup_costs, "measure_costs", measure_costs)
        patch.setattr(startup_costs, "measure_mode_costs", measure_mode_costs)
        yield
