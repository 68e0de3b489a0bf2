"""Measures, at start-up, what the choices between bypass and merged, and of drafts, depend on."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from dynamic_lora_adapters.apply.costs import NUM_ADAPTERS_GRID, KernelCosts
from dynamic_lora_adapters.apply.merge import Merger
from dynamic_lora_adapters.device.groups import PROBE_RANK, ProjectionGroup
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_adapters.kernels.factor_layout import layout_for
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.engine.startup.memory import free_memory
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.modes.costs import Points, StepCosts, rising

logger = logging.getLogger(__name__)

_ROWS = (1, 4, 8, 16, 32, 64, 128)
# Rows of each adapter, of those in `costs.LENGTH_GRID`: between two of them the nearer one counts,
# with all that it costs to read the adapter's tables.
_LENGTHS = (1, 4, 32)
_SAMPLES = 2


def settled_mode(wanted: Mode, device: torch.device, *, copied: int, widened: int = 0) -> Mode:
    """What is wanted, but that AUTO never merges on a GPU, nor where memory is short.

    Costs are measured of steps that run operator by operator. On a GPU decoding steps are captured
    ones, where deltas cost something else, and a merge that takes other rows out of them far more.
    Merges keep copies of weights, `copied` bytes in all, which may take half of what is free once
    weights that are kept short have taken `widened` bytes more.
    """
    if wanted is not Mode.AUTO:
        return wanted
    if device.type == "cuda":
        return Mode.BYPASS
    if copied and 2 * copied >= (free := free_memory(device) - widened):
        logger.warning(
            "Adapters are not merged: a copy of the weights takes %d MiB, and of free memory "
            "(%d MiB) half is for the caches",
            *(copied >> 20, free >> 20),
        )
        return Mode.BYPASS
    return wanted


def measure_mode_costs(
    groups: Sequence[ProjectionGroup],
    kernels: KernelCosts,
    merger: Merger,
    trial: Callable[[int], object],
    *,
    device: torch.device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    merges: bool = True,
) -> StepCosts:
    """Time steps of the base model and a switch, and add up what the kernels cost.

    `trial` runs a step of so many rows, one new token for each sequence. The
    switch is the merge of an adapter of rank 16 on every layer; without `merges` there is
    none: on plain weights even one takes the memory of a copy of the base. Takes a few
    steps' time: one to two seconds for a small model on a CPU. Layers that run
    whole in C++ add their deltas for somewhat less than the kernels alone take.
    """

    def step(num_rows: int) -> float:
        # What disturbs a measurement only ever adds to it.
        return min(_timed(device, lambda: trial(num_rows)) for _ in range(_SAMPLES))

    return StepCosts(
        base=rising(tuple((rows, step(rows)) for rows in _ROWS)),
        deltas=tuple((count, _delta_points(kernels, count)) for count in NUM_ADAPTERS_GRID),
        switch_s=_switch_s(groups, merger, device, dtype, factor_dtype) if merges else math.inf,
    )


def _delta_points(kernels: KernelCosts, num_adapters: int) -> Points:
    rows = [num_adapters * each for each in _LENGTHS]
    names: Mapping[str, object] = kernels.seconds
    return rising(
        tuple(
            (n, min(kernels.of(name, num_adapters, n / num_adapters) for name in names))
            for n in rows
        )
    )


def _switch_s(
    groups: Sequence[ProjectionGroup],
    merger: Merger,
    device: torch.device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None,
) -> float:
    layers = [group for group in groups if not group.is_head]
    # They come to nothing, and yet no row of b is one of zeros, which would be left out.
    linears = {
        path: LinearTerms(
            a=torch.zeros(PROBE_RANK, group.in_features), b=torch.ones(width, PROBE_RANK)
        )
        for group in layers
        for path, width in zip(group.paths, group.widths, strict=True)
    }
    pool = AdapterPool(
        groups,
        budget_bytes=2**62,
        device=device,
        dtype=dtype,
        factor_dtype=factor_dtype,
        layout=layout_for(device, factor_dtype),
        slab_slots=1,
        merges=True,
    )
    adapter = pool.admit("probe", AdapterTerms(linears=linears))
    assert adapter is not None

    def merge() -> float:
        seconds = _timed(device, lambda: merger.switch(adapter))
        merger.switch(None)
        return seconds

    # The first merge may also copy the weights to the host, which happens once.
    seconds = min(merge() for _ in range(_SAMPLES))
    if device.type == "cpu":
        merger.forget_copies()  # so that a start that measures leaves as much memory as another
    return seconds


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    _synchronise(device)
    begin = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - begin


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
