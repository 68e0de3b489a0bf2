"""Every delta kernel against the slow loop, over dtype x rank x batch x popularity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.device.slab import Slab
from dynamic_lora_adapters.kernels import REFERENCE, DeltaKernel, SlotFactors, kernels_for
from dynamic_lora_adapters.native import NativeUnavailable
from dynamic_lora_adapters.segments import Effect, Run
from tests.support.slabs import make_slab

POPULARITY = {
    "one": [8],
    "distinct": [1] * 8,
    "uniform": [4, 4, 4, 4],
    "zipf": [16, 8, 5, 4, 3],
    "skewed": [100, 1, 1],
    "single row": [1],
}
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-1}


def relative_error(kernel: DeltaKernel, lengths: list[int], rank: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    slab = make_slab(len(lengths) + 2, rank, 48, 80, generator=generator, dtype=dtype)
    run = Run(slab, 1, 0, lengths)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    x = torch.randn(run.num_rows, 48, generator=generator).to(dtype)
    expected = torch.randn(run.num_rows, 80, generator=generator).to(dtype)
    actual = expected.clone()
    REFERENCE(expected, x, SlotFactors(a[run.slots], b[run.slots]), run)
    kernel(actual, x, SlotFactors(a[run.slots], b[run.slots]), run)
    return float((actual - expected).abs().max())


@pytest.mark.parametrize("name", kernels_for(CPU, torch.float32))
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("rank", [8, 24, 64])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernel_equals_reference(name: str, popularity: str, rank: int, dtype: torch.dtype) -> None:
    kernels = kernels_for(CPU, dtype)
    if name not in kernels:
        pytest.skip(f"{name} does not compute in {dtype}")
    error = relative_error(kernels[name], POPULARITY[popularity], rank, dtype)
    assert error < TOLERANCE[dtype]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), rank=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_kernels_agree_on_any_lengths(lengths: list[int], rank: int) -> None:
    for kernel in kernels_for(CPU, torch.float32).values():
        assert relative_error(kernel, lengths, 8 * rank, torch.float32) < 1e-4


def test_reference_adds_the_product_to_the_output() -> None:
    slab = make_slab(1, 2, 3, 4)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    x, out = torch.randn(5, 3), torch.ones(5, 4)
    REFERENCE(out, x, SlotFactors(a, b), Run(slab, 0, 0, [5]))
    torch.testing.assert_close(out, 1 + x @ a[0].T @ b[0])


@pytest.mark.skipif(
    "native_segments" not in kernels_for(CPU, torch.float32), reason="there is no C++ compiler"
)
def test_tensors_that_cpp_cannot_read_are_refused() -> None:
    slab, kernel = make_slab(1, 2, 3, 4), kernels_for(CPU, torch.float32)["native_segments"]
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    factors, run = SlotFactors(a, b), Run(slab, 0, 0, [5])
    for x, out in (
        (torch.ones(5, 3).bfloat16(), torch.ones(5, 4)),
        (torch.ones(5, 3), torch.ones(5, 4).double()),
        (torch.ones(6, 3), torch.ones(5, 4)),
        (torch.ones(5, 3), torch.ones(4, 4)),
        (torch.ones(5, 3), torch.ones(4, 5).T),
    ):
        with pytest.raises(AssertionError):
            kernel(out, x, factors, run)


def with_blocks(
    lengths: list[int], members: list[tuple[int, int]], in_features: int
) -> tuple[Slab, torch.Tensor]:
    """Members of ranks and widths side by side, as in q/k/v, and a padded rank."""
    rank, width = sum(r for r, _ in members) + 1, sum(w for _, w in members)
    slab = make_slab(len(lengths), rank, in_features, width)
    columns = torch.zeros(len(lengths), rank, 2, dtype=torch.long)
    inside = torch.zeros(rank, width)
    row = column = 0
    for member_rank, member_width in members:
        columns[:, row : row + member_rank] = torch.tensor([column, column + member_width])
        inside[row : row + member_rank, column : column + member_width] = 1
        row, column = row + member_rank, column + member_width
    assert slab.b[0] is not None
    slab.b[0] *= inside
    return slab, columns


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    members=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 90)), min_size=1, max_size=3),
    in_features=st.integers(1, 40),
    undone=st.booleans(),
)
@settings(deadline=None)
def test_blocks_of_zeros_may_be_skipped(
    lengths: list[int], members: list[tuple[int, int]], in_features: int, undone: bool
) -> None:
    slab, columns = with_blocks(lengths, members, in_features)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    run = Run(slab, 0, 0, lengths, effect=Effect.UNDO if undone else Effect.APPLY)
    x = torch.randn(sum(lengths), in_features)
    expected = torch.randn(sum(lengths), b.shape[2])
    outputs = {name: expected.clone() for name in kernels_for(CPU, torch.float32)}
    REFERENCE(expected, x, SlotFactors(a, b, columns), run)
    for name, kernel in kernels_for(CPU, torch.float32).items():
        kernel(outputs[name], x, SlotFactors(a, b, columns), run)
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-4)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    members=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 90)), min_size=1, max_size=3),
    in_features=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    size=st.sampled_from([1.0, 1e-5]),  # in float16 the smaller ones are subnormal
)
@settings(deadline=None)
def test_factors_in_sixteen_bits_count_as_what_they_are(
    lengths: list[int],
    members: list[tuple[int, int]],
    in_features: int,
    dtype: torch.dtype,
    size: float,
) -> None:
    try:
        kernels = kernels_for(CPU, torch.float32, factor_dtype=dtype)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    slab, columns = with_blocks(lengths, members, in_features)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    a, b = (size * a).to(dtype), b.to(dtype)
    run = Run(slab, 0, 0, lengths)
    x = torch.randn(sum(lengths), in_features) / size
    expected = torch.randn(sum(lengths), b.shape[2])
    out = expected.clone()
    REFERENCE(expected, x, SlotFactors(a.float(), b.float(), columns), run)
    for kernel in kernels.values():
        kernel(out, x, SlotFactors(a, b, columns), run)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
