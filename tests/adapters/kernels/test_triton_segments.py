"""The Triton kernels against the slow loop, in Triton's interpreter, and compiled for GPUs."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.device.groups import GroupShape, ProjectionGroup
from dynamic_lora_adapters.device.slab import Slab
from dynamic_lora_adapters.device.tables import AddressTables, TableDeltas
from dynamic_lora_adapters.kernels import (
    KERNELS,
    REFERENCE,
    SlotFactors,
    compiled_ahead,
    has_triton,
    kernels_for,
)
from dynamic_lora_adapters.segments import Effect, Run
from dynamic_lora_adapters.tiles import LONG, SHORT, tiles_of
from tests.support.slabs import make_slab, resident
from tests.support.triton import (
    CAPABILITIES,
    compile_for_a_gpu,
    interpreted,
    to_be_compiled,
)

POPULARITY = {
    "one": [8],
    "distinct": [1] * 4,
    "skewed": [70, 1, 3],
    "tiles cut": [17, 16, 1],
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-1, torch.float16: 2e-2}
CPU = torch.device("cpu")
# Sizes of layers, which Triton compiles for; others change from step to step.
DIVISIBLE = ("x_stride", "in_features", "split_size", "out_stride", "out_features")


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted():
        from dynamic_lora_adapters.kernels import triton_segments

        yield triton_segments


CASES = [(name, rank, torch.float32) for name in POPULARITY for rank in (8, 72)]
CASES += [("tiles cut", 24, dtype) for dtype in TOLERANCE]


@pytest.mark.parametrize(("popularity", "rank", "dtype"), CASES, ids=str)
def test_kernel_equals_reference(
    kernels: ModuleType, popularity: str, rank: int, dtype: torch.dtype
) -> None:
    lengths = POPULARITY[popularity]
    generator = torch.Generator().manual_seed(0)
    # 1100 columns: five splits of two steps in 16 bits, the last one short.
    slab = make_slab(len(lengths) + 2, rank, 1100, 136, generator=generator, dtype=dtype)
    run = Run(slab, 1, 0, lengths, effect=Effect.UNDO)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    x = torch.randn(run.num_rows, 1100, generator=generator).to(dtype)
    expected = torch.randn(run.num_rows, 136, generator=generator).to(dtype)
    actual = expected.clone()
    REFERENCE(expected, x, SlotFactors(a[run.slots], b[run.slots]), run)
    kernels.TritonSegments()(actual, x, SlotFactors(a[run.slots], b[run.slots]), run)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=0)


def test_rows_may_be_parts_of_wider_tensors(kernels: ModuleType) -> None:
    slab = make_slab(1, 8, 20, 12)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    x, out = torch.randn(5, 40)[:, :20], torch.zeros(5, 30)
    kernels.TritonSegments()(out[:, :12], x, SlotFactors(a, b), Run(slab, 0, 0, [5]))
    torch.testing.assert_close(out[:, :12], x @ a[0].T @ b[0])
    assert not out[:, 12:].any()


def test_tables_serve_slabs_of_any_rank_in_one_launch(kernels: ModuleType) -> None:
    del kernels
    small, large = make_slab(2, 8, 40, 24, number=1), make_slab(2, 32, 40, 24, number=2)
    adapters = [resident(small, 1), resident(large, 0)]
    tables = AddressTables([ProjectionGroup(("q",), 40, (24,))], 4, CPU)
    first, second = tables.entries(adapters)
    assert [int(tables.ranks[0, e]) for e in (first, second)] == [8, 32]
    # Rows 0-1 are base rows, 5-7 padding.
    tiles = tiles_of([(None, 2), (first, 1), (second, 2)], SHORT)
    buffer = torch.full((1 + 3 * 8,), 99, dtype=torch.int32)
    buffer[: len(tiles)] = torch.tensor(tiles)
    x, out = torch.randn(8, 40), torch.randn(8, 24)
    expected = out.clone()
    for row, slab, slot in ((2, small, 1), (3, large, 0), (4, large, 0)):
        a, b = slab.a[0], slab.b[0]
        assert a is not None and b is not None
        expected[row] += x[row] @ a[slot].T @ b[slot]
    TableDeltas(tables, buffer, 8).add(0, out, x)
    torch.testing.assert_close(out, expected)


def test_tables_of_joined_layers_serve_few_ranks_many_and_none(kernels: ModuleType) -> None:
    """Room for 192 ranks takes three blocks of programs, of which small adapters need one."""
    del kernels
    few, many = make_slab(1, 8, 40, 24, number=1), make_slab(1, 130, 40, 24, number=2)
    none = Slab(
        number=3, signature=(GroupShape(),), a=[None], b=[None], num_bytes=0, tenants=[None]
    )
    tables = AddressTables([ProjectionGroup(("q", "k", "v"), 40, (8, 8, 8))], 4, CPU)
    entries = tables.entries([resident(slab, 0) for slab in (few, many, none)])
    tiles = torch.tensor(tiles_of([(entry, 1) for entry in entries], SHORT), dtype=torch.int32)
    x, out = torch.randn(3, 40), torch.full((3, 24), -0.0)
    TableDeltas(tables, tiles, 3).add(0, out, x)
    for row, slab in enumerate((few, many)):
        a, b = slab.a[0], slab.b[0]
        assert a is not None and b is not None
        torch.testing.assert_close(out[row], x[row] @ a[0].T @ b[0])
    assert out[2].signbit().all(), "rows without a delta are not written"


def test_one_program_is_compiled_for_every_number_of_rows_and_ranks() -> None:
    with to_be_compiled():
        from dynamic_lora_adapters.kernels import triton_segments

        for kernel in (triton_segments._shrink, triton_segments._expand):
            general = {param.name for param in kernel.params if param.do_not_specialize}
            assert general == {"num_rows", "max_rank"}


class Recording:
    """A kernel that notes which variants of it are launched, and runs none."""

    def __init__(self) -> None:
        self.variants: set[tuple[int, int, int]] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **constants: Any) -> None:
            self.variants.add((constants["ROWS"], constants["RANKS"], constants.get("SPLITS", 0)))

        return launch


def test_every_variant_is_compiled_ahead(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ranks and lengths a run has, its variant of both kernels has been launched."""

    def launched(run: Callable[[], object]) -> list[set[tuple[int, int, int]]]:
        both = Recording(), Recording()
        monkeypatch.setattr(kernels, "_shrink", both[0])
        monkeypatch.setattr(kernels, "_expand", both[1])
        run()
        return [kernel.variants for kernel in both]

    def serve() -> None:
        for width, rank, length in product((1100, 40), (8, 24, 40, 72), (1, 70)):
            slab = make_slab(1, rank, width, 24)
            a, b = slab.a[0], slab.b[0]
            assert a is not None and b is not None
            x, out = torch.zeros(length, width), torch.zeros(length, 24)
            kernels.TritonSegments()(out, x, SlotFactors(a, b), Run(slab, 0, 0, [length]))

    shapes = [(1100, 24), (40, 24)]
    triton = {"triton_segments": kernels.TritonSegments()}
    ahead = launched(lambda: compiled_ahead(triton, shapes, CPU, torch.float32))
    assert all(ahead)
    assert launched(serve) == ahead


def test_what_needs_no_compiler_is_left_alone() -> None:
    assert compiled_ahead(KERNELS, [(40, 24)], CPU, torch.float32) == KERNELS


def test_kernels_that_do_not_compile_are_left_out_by_name(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(kernels, "compile_ahead", broken)
    found = {**KERNELS, "triton_segments": kernels.TritonSegments()}
    assert compiled_ahead(found, [(40, 24)], CPU, torch.float32) == KERNELS
    assert (
        "Triton's delta kernels do not compile here: RuntimeError: out of resource" in caplog.text
    )


@pytest.mark.parametrize(
    ("dtype", "rows", "ranks", "step"),
    [
        ("fp32", SHORT, 32, 32),
        ("fp32", LONG, 64, 32),
        ("bf16", SHORT, 16, 128),
        ("bf16", SHORT, 32, 128),
        ("bf16", LONG, 16, 128),
        ("bf16", LONG, 64, 128),
        ("fp16", LONG, 64, 128),
    ],
)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_a_gpu(
    dtype: str,
    rows: int,
    ranks: int,
    step: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Needs no GPU: Triton brings its own compiler and assembler. The larger ones take the most
    shared memory. No tile is large enough for what only Hopper multiplies so (WGMMA)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pytest.importorskip("triton", reason="Triton is not installed")
    from dynamic_lora_adapters.kernels import triton_segments

    shapes = {"ADDRESSES": True, "ROWS": rows, "RANKS": ranks, "UPCAST": False}
    pointers = {"x": dtype, "out": dtype, "shrunk": "fp32", "a": "i64", "b": "i64"}
    pointers |= {"ranks": "i32", "tiles": "i32"}
    for function, own in (
        (triton_segments.shrink_kernel, {"STEP": step}),
        (triton_segments.expand_kernel, {"SPLITS": 8, "COLUMNS": 128}),
    ):
        ptx = compile_for_a_gpu(function, pointers, shapes | own, capability, DIVISIBLE)
        assert "mma.sync" in ptx or dtype == "fp32"
        assert "wgmma" not in ptx


def test_kernels_that_do_not_run_are_left_out_by_name(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert has_triton(CPU)

    def broken(device: torch.device) -> None:
        raise OSError(f"no compiler for {device}")

    monkeypatch.setattr(kernels, "try_out", broken)
    # Another name of the same device: what was tried is remembered.
    assert not has_triton(torch.device("cpu", 0))
    assert "do not run here: OSError: no compiler for cpu:0" in caplog.text


def test_where_there_is_no_cuda_only_the_interpreter_runs_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not has_triton(CPU)
    found = set(kernels_for(CPU, torch.float32))
    assert set(KERNELS) <= found
    assert not found & {"triton_segments", "grouped_gemm"}
