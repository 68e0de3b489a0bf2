"""Measures, at start-up, what the choice between bypass and merged depends on."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.costs import KernelCosts
from dynamic_lora_adapters.groups import ProjectionGroup
from dynamic_lora_adapters.merge import Merger
from dynamic_lora_adapters.slots import AdapterPool
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.engine.attention import AttentionStep, attending
from dynamic_lora_server.engine.probe import packed_spans, run_packed
from dynamic_lora_server.modes.costs import Points, StepCosts, rising

_ROWS = (1, 8, 32, 128)
_ADAPTERS = (1, 2, 4, 8, 16, 32)
_SAMPLES = 2
_PROBE_RANK = 16


def measure_mode_costs(
    model: PreTrainedModel,
    groups: Sequence[ProjectionGroup],
    kernels: KernelCosts,
    merger: Merger,
) -> StepCosts:
    """Time steps of the base model and a switch, and add up what the kernels cost.

    Steps are timed without a KV cache, one new token for each sequence. The
    switch is one to a random adapter of rank 16 on every layer. Takes a few
    steps' time: one to two seconds for a small model on a CPU.
    """
    base = tuple((rows, _step(model, rows)) for rows in _ROWS)
    deltas = tuple((count, _delta_points(kernels, count)) for count in _ADAPTERS)
    return StepCosts(base=rising(base), deltas=deltas, switch_s=_switch_s(model, groups, merger))


def _step(model: PreTrainedModel, num_rows: int) -> float:
    """The least of several runs: what disturbs a measurement only ever adds to it."""
    ids = [torch.zeros(1, dtype=torch.long, device=model.device)] * num_rows
    seconds = []
    for _ in range(_SAMPLES):
        with attending(AttentionStep(packed_spans((1,) * num_rows))):
            seconds.append(_timed(model.device, lambda: run_packed(model, ids)))
    return min(seconds)


def _delta_points(kernels: KernelCosts, num_adapters: int) -> Points:
    rows = [num_adapters * each for each in (1, 4, 16)]
    names: Mapping[str, object] = kernels.seconds
    return rising(
        tuple(
            (n, min(kernels.of(name, num_adapters, n / num_adapters) for name in names))
            for n in rows
        )
    )


def _switch_s(model: PreTrainedModel, groups: Sequence[ProjectionGroup], merger: Merger) -> float:
    layers = [group for group in groups if not group.is_head]
    linears = {
        path: LinearTerms(
            a=torch.zeros(_PROBE_RANK, group.in_features), b=torch.zeros(width, _PROBE_RANK)
        )
        for group in layers
        for path, width in zip(group.paths, group.widths, strict=True)
    }
    pool = AdapterPool(groups, budget_bytes=2**62, device=model.device, dtype=model.dtype)
    adapter = pool.admit("probe", AdapterTerms(linears=linears))
    assert adapter is not None
    seconds = []
    for _ in range(_SAMPLES):
        seconds.append(_timed(model.device, lambda: merger.switch(adapter)))
        seconds.append(_timed(model.device, lambda: merger.switch(None)))
    # The first merge may also copy the weights to the host, which happens once.
    return min(seconds[0::2]) if len(seconds) > 2 else max(seconds)


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    _synchronise(device)
    begin = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - begin


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
