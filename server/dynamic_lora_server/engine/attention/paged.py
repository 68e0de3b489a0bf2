"""Attention straight from KV pages with torch's variable-length kernel (CUDA)."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.batch import Span

# The flash kernel behind varlen_attn reads pages in blocks of this many cells.
PAGE_SIZE = 256


def paged_kernel_available(device: torch.device) -> bool:
    """Whether this torch can attend to pages through a block table on this device.

    `varlen_attn` takes `block_table` and `seqused_k` from torch 2.12 on; where
    it does not, pages are gathered instead.
    """
    if device.type != "cuda":
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k"} <= set(inspect.signature(varlen_attn).parameters)


@dataclass(frozen=True, slots=True)
class PagedTables:
    """Index tensors of one step, int32.

    Shapes: cumulative [num_sequences + 1], the packed rows of each sequence;
    used [num_sequences], its tokens in the cache; block_table [num_sequences,
    max_pages], its pages, padded with 0.
    """

    cumulative: torch.Tensor
    used: torch.Tensor
    block_table: torch.Tensor
    max_new: int
    max_total: int
    page_size: int

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "PagedTables":
        """Read the tables off the spans of a batch whose KV space is paged."""
        page_size = spans[0].chunk_size
        pages = [[start // page_size for start in span.starts] for span in spans]
        width = max(map(len, pages))
        cumulative = [0]
        for span in spans:
            cumulative.append(cumulative[-1] + span.num_new)

        def tensor(values: object) -> torch.Tensor:
            return to_device(values, device, torch.int32)

        return cls(
            cumulative=tensor(cumulative),
            used=tensor([span.num_total for span in spans]),
            block_table=tensor([row + [0] * (width - len(row)) for row in pages]),
            max_new=max(span.num_new for span in spans),
            max_total=max(span.num_total for span in spans),
            page_size=page_size,
        )


@dataclass(frozen=True, slots=True)
class PagedKernel:
    """Calls `torch.nn.attention.varlen.varlen_attn` on the pages of one step."""

    tables: PagedTables

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """q [num_tokens, heads, dim] over cells [num_cells, kv_heads, dim] -> like q."""
        from torch.nn.attention.varlen import varlen_attn

        tables = self.tables
        pages = (-1, tables.page_size)
        out = varlen_attn(
            q,
            keys.unflatten(0, pages),
            values.unflatten(0, pages),
            tables.cumulative,
            None,
            tables.max_new,
            tables.max_total,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[1] != keys.shape[1],
            seqused_k=tables.used,
            block_table=tables.block_table,
        )
        assert isinstance(out, torch.Tensor)
        return out
