"""Attention of a step whose shape is fixed: one new token a row, pages named by tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynamic_lora_server.engine.attention.packed import AttentionStep, Rule
from dynamic_lora_server.engine.attention.paged import PagedTables
from dynamic_lora_server.errors import UnsupportedModel

StaticKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int | None], torch.Tensor]
"""Called as `PagedKernel` is."""


@dataclass(frozen=True, slots=True)
class GatheredPages:
    """What `PagedKernel` computes, for one new token a sequence, with plain operations.

    Gathers every page of the tables, used or not: a reference, and what runs
    where the kernel does not.
    """

    tables: PagedTables

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """q [num_rows, heads, dim] over cells [num_cells, kv_heads, dim] -> like q."""
        tables = self.tables
        offsets = torch.arange(tables.page_size, device=q.device)
        cells = (tables.block_table[:, :, None] * tables.page_size + offsets).flatten(1)
        position = torch.arange(cells.shape[1], device=q.device)
        seen = position < tables.used[:, None]
        if window is not None:
            seen &= position >= tables.used[:, None] - window

        def gather(table: torch.Tensor) -> torch.Tensor:
            # What was never written may be no number, which no mask makes zero.
            return table[cells].masked_fill(~seen[:, :, None, None], 0).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            q[:, :, None],
            gather(keys),
            gather(values),
            attn_mask=seen[:, None, None],
            scale=scaling,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        return out[:, :, 0]


@dataclass(slots=True, kw_only=True)
class StaticAttention(AttentionStep):
    """Writes and attends as an `AttentionStep` does, reading all that changes from tensors."""

    kernel: StaticKernel

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """As `AttentionStep.attend`. Raises UnsupportedModel for soft-capped logits and sinks."""
        if not rule.plain:
            raise UnsupportedModel("soft-capped logits and attention sinks have no static step")
        assert self.cache is not None and self.cells is not None
        self.cache.write(layer, self.cells, k.transpose(0, 1), v.transpose(0, 1))
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return self.kernel(q.transpose(0, 1), keys, values, rule.scaling, rule.window)
