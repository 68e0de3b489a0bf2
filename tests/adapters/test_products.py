import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.products import PackedProduct, PlainProduct, can_pack, packing_pays

needs_packing = pytest.mark.skipif(
    not can_pack(torch.ones(8, 8)), reason="oneDNN does not pack float32 weights on this processor"
)


@needs_packing
@given(
    rows=st.integers(1, 70),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 70),
    biased=st.booleans(),
    strided=st.booleans(),
)
@torch.inference_mode()
def test_packed_equals_plain(
    rows: int, out_features: int, in_features: int, biased: bool, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if biased else None
    x = torch.randn(1, rows, 2 * in_features, generator=generator)
    x = x[..., ::2] if strided else x[..., :in_features].contiguous()
    plain = PlainProduct(weight, bias)(x)
    packed = PackedProduct(weight, bias)(x)
    assert packed.shape == (1, rows, out_features)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)


@needs_packing
def test_whether_packing_pays_is_measured() -> None:
    assert packing_pays(torch.randn(64, 64)) in {True, False}


def test_a_weight_that_is_not_on_the_cpu_cannot_be_packed() -> None:
    assert not can_pack(torch.empty(8, 8, device="meta"))


def test_a_dtype_that_onednn_does_not_know_cannot_be_packed() -> None:
    assert not can_pack(torch.ones(8, 8, dtype=torch.float64))
