"""The kernels and uploads that need CUDA."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.apply.pristine import CopiedWeights
from dynamic_lora_adapters.device.groups import GroupTerms
from dynamic_lora_adapters.device.upload import upload_for
from dynamic_lora_adapters.kernels import REFERENCE, SlotFactors, kernels_for
from dynamic_lora_adapters.segments import Run
from dynamic_lora_adapters.weight import parts_of
from tests.support.slabs import make_slab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1, torch.float16: 3e-2}
NAMES = ["segment_loop", "rank_concat", "sorted_groups", "triton_segments", "grouped_gemm"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[1], [8], [1] * 32, [100, 1, 17]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [16, 24, 64])
def test_kernel_equals_reference(
    name: str, lengths: list[int], dtype: torch.dtype, rank: int
) -> None:
    kernels = kernels_for(CUDA, dtype, (2048, 256))
    if name not in kernels:
        pytest.skip(f"{name} does not run in {dtype} here")
    generator = torch.Generator().manual_seed(0)
    slab = make_slab(len(lengths) + 2, rank, 2048, 256, generator=generator, dtype=dtype)
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    run = Run(slab, 1, 0, lengths)
    x = torch.randn(run.num_rows, 2048, generator=generator).to(dtype)
    expected = torch.randn(run.num_rows, 256, generator=generator).to(dtype)
    actual = expected.to(CUDA)
    REFERENCE(expected, x, SlotFactors(a[run.slots], b[run.slots]), run)
    factors = SlotFactors(a.to(CUDA)[run.slots], b.to(CUDA)[run.slots])
    kernels[name](actual, x.to(CUDA), factors, run)
    torch.testing.assert_close(actual.cpu(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_an_upload_arrives_before_its_event() -> None:
    upload = upload_for(CUDA)
    place = GroupTerms(a=torch.zeros(64, 4096, device=CUDA, dtype=torch.bfloat16))
    terms = GroupTerms(a=torch.full((64, 4096), 3.0))
    event = upload.write([terms], [place])
    assert event is not None
    event.wait()
    assert place.a is not None
    assert bool((place.a == 3).all())


def test_the_base_comes_back_from_pinned_memory() -> None:
    weight = torch.randn(64, 96, device=CUDA)
    before = weight.clone()
    projection: Any = SimpleNamespace(base=SimpleNamespace(separate=False), weight=weight)
    pristine = CopiedWeights()
    assert all(map(torch.equal, parts_of(pristine.weight(0, projection, None)), [before]))
    weight.add_(1)
    assert all(part.is_pinned() for part in parts_of(pristine.value(0, projection)))
    assert all(map(torch.equal, parts_of(pristine.weight(0, projection, None)), [before]))
