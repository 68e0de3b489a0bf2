"""Attention in the forms that CUDA's kernels take gives the numbers of plain operations."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias

from dynamic_lora_server.engine.attention.fused import attend_prompt

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def mask_of(new: int, total: int, window: int | None) -> torch.Tensor:
    last = torch.arange(total - new, total)[:, None]
    column = torch.arange(total)
    return (column <= last) & (column > last - (total if window is None else window))


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, mask: torch.Tensor
) -> torch.Tensor:
    group = q.shape[0] // k.shape[0]
    k, v = (part.float().repeat_interleave(group, 0) for part in (k, v))
    scores = (q.float() @ k.transpose(1, 2) * scaling).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("new", "total"), [(7, 7), (3, 40), (2, 3)])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_it_equals_plain_operations(
    kv_heads: int, new: int, total: int, window: int | None, dtype: torch.dtype
) -> None:
    q = draw(6, new, 16, dtype=dtype)
    # As they lie in the cache: a token's heads side by side.
    k, v = (draw(total, kv_heads, 16, dtype=dtype).transpose(0, 1) for _ in range(2))
    mask = mask_of(new, total, window)
    actual = attend_prompt(q, k, v, 0.3, None if window is None else mask)
    assert actual.dtype is dtype
    expected = by_hand(q, k, v, 0.3, mask)
    torch.testing.assert_close(actual.float(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(
    ("dtype", "masked", "grouped"),
    [
        (torch.bfloat16, False, True),
        (torch.float32, False, False),
        (torch.bfloat16, True, False),
        (torch.float32, True, False),
    ],
    ids=str,
)
def test_heads_are_repeated_only_for_the_kernel_that_takes_no_groups(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool, grouped: bool
) -> None:
    given: dict[str, object] = {}

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object
    ) -> torch.Tensor:
        assert v.shape == k.shape
        given.update(options, heads=k.shape[1])
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    q, k = draw(6, 3, 16, dtype=dtype), draw(2, 9, 16, dtype=dtype)
    attend_prompt(q, k, k, 0.3, mask_of(3, 9, 4) if masked else None)
    assert given["enable_gqa"] is grouped
    assert given["heads"] == (2 if grouped else 6)
    assert isinstance(given["attn_mask"], CausalBias) is not masked
