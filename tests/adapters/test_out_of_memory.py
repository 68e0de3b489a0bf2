"""Kernels that find no memory, each in a process of its own: one that fails otherwise ends it."""

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.kernels import SlotFactors
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_adapters.native.draws import Draw, NativeDraws
from dynamic_lora_adapters.native.head import NativeHead
from dynamic_lora_adapters.native.layer import (
    LayerParts,
    LayerStack,
    LayerStep,
    NativeLayer,
    Site,
    delta_runs,
)
from dynamic_lora_adapters.native.norm import NativeRmsNorm
from dynamic_lora_adapters.native.product import NativeProduct
from dynamic_lora_adapters.segments import DeltaPlan, Run
from tests.support.slabs import make_slab

STATM = Path("/proc/self/statm")
MIB = 2**20
LEFT_BYTES = 32 * MIB
WIDTH = 16
Call = Callable[[], torch.Tensor]
pytestmark = [
    pytest.mark.skipif(
        obstacle(ProductKind.NATIVE, torch.ones(1, 1)) is not None, reason="no C++ compiler"
    ),
    pytest.mark.skipif(not STATM.exists(), reason="no process's size can be read here"),
]


@contextmanager
def little_memory() -> Iterator[None]:
    """Has the system refuse this process more than LEFT_BYTES beyond what it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LEFT_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def make_norm() -> NativeRmsNorm:
    return NativeRmsNorm(nn.RMSNorm(WIDTH), 1e-5, 0.0)


def make_site(out_features: int, in_features: int) -> Site:
    return Site(NativeProduct(torch.ones(out_features, in_features), None), 0)


def product() -> Call:
    weigh, x = NativeProduct(torch.ones(8, 1024), None), torch.ones(32768, 1024)
    weigh(x[:8])
    return lambda: weigh(x)


def packing() -> Call:
    rank = 2**20
    weight, packed = torch.ones(WIDTH, 2), NativeProduct(torch.ones(WIDTH, 2), None)
    a, b = torch.zeros(rank, 2), torch.ones(rank, WIDTH)

    def fold() -> torch.Tensor:
        try:
            packed.replace_folded(2 * weight, a, b)
        except MemoryError:
            assert torch.equal(packed(torch.eye(2)), weight.T), "a part of it was replaced"
            raise
        return packed(torch.eye(2))

    return fold


def segments() -> Call:
    slab = make_slab(1, 512, 1, 1)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    factors, x, out = SlotFactors(a, b), torch.ones(32768, 1), torch.zeros(32768, 1)
    apply, run = NativeSegments(), Run(slab, 0, 0, [32768])

    def add() -> torch.Tensor:
        apply(out, x, factors, run)
        return out

    return add


def attention() -> Call:
    attend, seen, heads = NativeAttention(), 2**17, 256
    q, table = torch.ones(heads, 4, WIDTH), torch.ones(seen, 1, WIDTH)
    out = torch.zeros(4, heads, WIDTH)

    def all_of(count: int) -> torch.Tensor:
        items = torch.tensor([[row, 0, count] for row in range(4)])
        attend.attend(q, table, table, out, items, scaling=0.1)
        return out

    all_of(1)
    return lambda: all_of(seen)


def draws() -> Call:
    draw, logits = NativeDraws(), torch.zeros(2, 2**23)
    wanted = [Draw(row=row, key=row, temperature=1.0, min_p=0.5) for row in range(2)]
    draw(logits[:, :100], wanted)
    return lambda: draw(logits, wanted)


def head() -> Call:
    """With room for one of two threads."""
    find = NativeHead(make_norm(), NativeProduct(torch.ones(40, WIDTH), None))
    hidden, rows = torch.ones(1, WIDTH), torch.zeros(2**20, dtype=torch.long)
    torch.set_num_threads(1)
    find(hidden, rows)
    torch.set_num_threads(2)
    find(hidden, rows[:1])
    return lambda: find(hidden, rows).verdicts


def layer_and_step() -> tuple[NativeLayer, LayerStep]:
    """One whose inner outputs alone take 128 MiB."""
    rows, inner = 2048, 8192
    parts = LayerParts(
        input_norm=make_norm(),
        middle_norm=make_norm(),
        q_norm=None,
        k_norm=None,
        qkv=make_site(3 * WIDTH, WIDTH),
        o=make_site(WIDTH, WIDTH),
        gate_up=make_site(2 * inner, WIDTH),
        down=make_site(WIDTH, inner),
        heads=1,
        kv_heads=1,
        dim=WIDTH,
        q=0,
        k=WIDTH,
        v=2 * WIDTH,
        gate=0,
        up=inner,
        scaling=0.1,
    )
    keys, values = torch.zeros(2, rows, 1, WIDTH)
    runs = delta_runs(DeltaPlan(()))
    assert runs is not None
    cells = torch.arange(rows)
    items = torch.stack([cells, torch.zeros_like(cells), torch.ones_like(cells)], 1)
    step = LayerStep(cells, items, runs)
    step.rotate_by(torch.ones(1, WIDTH), torch.zeros(1, WIDTH), torch.zeros_like(cells), WIDTH)
    layer = NativeLayer(parts, keys, values)
    step.room(*layer.widths)
    return layer, step


def whole_layers() -> Call:
    layer, step = layer_and_step()
    stack, hidden = LayerStack([layer, layer]), torch.ones(step.num_rows, WIDTH)
    return lambda: stack.run(step, hidden)


def first_half() -> Call:
    layer, step = layer_and_step()
    hidden = torch.ones(step.num_rows, WIDTH)
    return lambda: layer.attend(step, hidden)[1]


def second_half() -> Call:
    layer, step = layer_and_step()
    hidden = torch.ones(step.num_rows, WIDTH)
    return lambda: layer.finish(step, hidden, hidden)


@torch.inference_mode()
def refusal(make: Callable[[], Call]) -> str:
    """What is said where there is little memory; the same call, with more, then has a result."""
    torch.set_num_threads(2)
    call = make()
    with little_memory(), pytest.raises(MemoryError) as refused:
        call()
    assert bool(call().isfinite().all())
    return str(refused.value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (product, "product"),
        (packing, "pack"),
        (segments, "segments"),
        (attention, "attend"),
        (draws, "draws"),
        (head, "highest"),
        (whole_layers, "layers"),
        (first_half, "layer_attend"),
        (second_half, "layer_finish"),
    ],
)
def test_a_call_that_finds_no_memory_says_so_and_the_next_one_runs(
    make: Callable[[], Call], name: str
) -> None:
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning) as processes:
        said = processes.submit(refusal, make).result(timeout=100)
    assert said == f"no memory is left for what dynamic_lora_{name} keeps while it runs"
