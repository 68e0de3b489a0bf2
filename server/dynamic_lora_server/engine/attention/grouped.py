"""Decoding sequences of similar length, attended to together.

One attention call per sequence costs more in calls than in arithmetic when
histories are short. Such sequences are gathered, padded to the longest of
their group, and attended to in one call; long histories are not worth the
copy and are left to a call each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.batch import Span

# Beyond this many cached tokens the gather costs more than the calls it saves
# (measured on 2 cores with 3 KV heads of 64: 2.4x faster at 96, even at 512).
MAX_LENGTH = 512
MIN_SEQUENCES = 2


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Index tensors of one group of B sequences padded to T cached tokens.

    Shapes: rows [B], their rows in the packed batch; cells [B * T]; mask
    [B, 1, 1, T], 0 for a cached token and -inf for padding.
    """

    rows: torch.Tensor
    cells: torch.Tensor
    mask: torch.Tensor

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """q [heads, num_tokens, dim] over cells [num_cells, kv_heads, dim] -> [B, heads, dim]."""
        num_kv_heads = keys.shape[1]
        chosen = q.index_select(1, self.rows).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            chosen.unflatten(1, (num_kv_heads, -1)),
            self._gather(keys).to(q.dtype),
            self._gather(values).to(q.dtype),
            attn_mask=self.mask,
            scale=scaling,
        )
        return out.flatten(1, 2)

    def _gather(self, table: torch.Tensor) -> torch.Tensor:
        gathered = table.index_select(0, self.cells)
        return gathered.view(self.rows.shape[0], -1, *table.shape[1:]).transpose(1, 2)


def group_decodes(
    spans: Sequence[Span], window: int | None, like: torch.Tensor
) -> tuple[list[DecodeGroup], list[Span]]:
    """Split spans into groups for one call each and single spans.

    `like` gives the dtype and device of the tensors. Lengths within a factor
    of two share a group, so that less than half of it is padding.
    """
    buckets: dict[int, list[Span]] = {}
    singles: list[Span] = []
    for span in spans:
        seen = _seen(span, window)
        if span.num_new == 1 and seen <= MAX_LENGTH:
            buckets.setdefault(seen.bit_length(), []).append(span)
        else:
            singles.append(span)
    groups = []
    for bucket in buckets.values():
        if len(bucket) >= MIN_SEQUENCES:
            groups.append(_build(bucket, window, like))
        else:
            singles += bucket
    return groups, singles


def _seen(span: Span, window: int | None) -> int:
    return span.num_total if window is None else min(span.num_total, window)


def _build(spans: Sequence[Span], window: int | None, like: torch.Tensor) -> DecodeGroup:
    seen = torch.tensor([_seen(span, window) for span in spans])
    column = torch.arange(int(seen.max()))
    inside = column < seen[:, None]
    first = torch.tensor([span.num_total for span in spans]) - seen
    # Padding repeats the last token: its cell is valid, its weight is zero.
    positions = first[:, None] + torch.minimum(column, seen[:, None] - 1)
    sizes = torch.tensor([span.chunk_size for span in spans])[:, None]
    starts = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(span.starts) for span in spans], batch_first=True
    )
    cells = starts.gather(1, positions // sizes) + positions % sizes
    mask = torch.zeros(inside.shape, dtype=like.dtype).masked_fill(~inside, float("-inf"))
    return DecodeGroup(
        rows=to_device([span.row for span in spans], like.device),
        cells=to_device(cells.flatten(), like.device),
        mask=to_device(mask[:, None, None], like.device),
    )
