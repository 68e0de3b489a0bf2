"""torch's grouped GEMM, which has a slow form on CPUs, against the slow loop."""

import pytest
import torch

from dynamic_lora_adapters.kernels import REFERENCE, SlotFactors
from dynamic_lora_adapters.kernels.grouped_gemm import GroupedGemm
from dynamic_lora_adapters.segments import Effect, Run
from tests.support.slabs import make_slab

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-1}


@pytest.mark.parametrize("lengths", [[8], [1] * 6, [100, 1, 17]], ids=str)
@pytest.mark.parametrize("effect", [Effect.APPLY, Effect.UNDO])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernel_equals_reference(lengths: list[int], effect: Effect, dtype: torch.dtype) -> None:
    slab = make_slab(len(lengths) + 2, 24, 48, 80, dtype=dtype)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    run = Run(slab, 1, 0, lengths, effect=effect)
    x, expected = torch.randn(run.num_rows, 48).to(dtype), torch.randn(run.num_rows, 80).to(dtype)
    actual = expected.clone()
    REFERENCE(expected, x, SlotFactors(a[run.slots], b[run.slots]), run)
    GroupedGemm()(actual, x, SlotFactors(a[run.slots], b[run.slots]), run)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=0)
