"""Attention of one sequence, in forms that torch's fused kernels take.

On CUDA, what they do not take falls to one that keeps every score in float32, and a copy of
the keys and values for each query head. Flash attention, for 16 bits, takes grouped heads and
the causal rule, but no other mask; the memory-efficient kernel takes masks and float32, but
wants a key for each query head.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right


def attend_prompt(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """New tokens on CUDA: q [heads, new, dim] over k, v [kv_heads, total, dim] -> like q.

    Without a `mask` [new, total], True where a token may look, the new tokens are the last
    of `total`, and each sees itself and what is before it.
    """
    grouped = q.shape[0] != k.shape[0]
    if grouped and (mask is not None or q.dtype == torch.float32):
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        grouped = False
    return F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=_causal(q.shape[1], k.shape[1]) if mask is None else mask,
        scale=scaling,
        enable_gqa=grouped,
    )[0]


@lru_cache(maxsize=32)
def _causal(new: int, total: int) -> CausalBias:
    """The causal rule by name. Kept for the layers of a step.

    It asks for the host memory of a mask, which nobody touches.
    """
    return causal_lower_right(new, total)


def attend_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """One new token: the query heads of a KV head become the rows of one small product."""
    grouped = q.view(1, k.shape[0], -1, q.shape[2])
    out = F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scaling)
    return out.view(q.shape[0], 1, v.shape[2])
