"""A decoding step of fixed shape: the same tensors every time, filled anew before each.

Rows that no sequence fills are padding: they read and write one page that
belongs to nobody. Capturing this step makes a CUDA graph; run as it is, it is
a step like any other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.layers import DeltaSite
from dynamic_lora_adapters.slab import ResidentAdapter
from dynamic_lora_adapters.tables import AddressTables, TableDeltas
from dynamic_lora_adapters.tiles import SHORT, tiles_of
from dynamic_lora_server.engine.attention import attending
from dynamic_lora_server.engine.kv_cache import KVCache
from dynamic_lora_server.engine.kv_space import Allocation
from dynamic_lora_server.engine.paged_attention import PagedKernel, PagedTables
from dynamic_lora_server.engine.probe import forward
from dynamic_lora_server.engine.static_attention import GatheredPages, StaticAttention, StaticKernel


@dataclass(frozen=True, slots=True)
class Row:
    """One decoding sequence's next token; `adapter` acts on it."""

    token_id: int
    position: int
    allocation: Allocation
    adapter: ResidentAdapter | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticShape:
    """Sizes of the buffers: rows, pages a sequence, and the first cell of the padding's page."""

    max_rows: int
    max_pages: int
    page_size: int
    scratch_cell: int
    vocab_size: int


class _Mirrored:
    """An integer tensor on the device and its image on the host, pinned where that is CUDA.

    The image may be filled again once the step it was sent for has answered.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.device = torch.zeros(shape, dtype=dtype, device=device)

    def send(self) -> None:
        """Copy host to device on the current stream."""
        self.device.copy_(self.host, non_blocking=True)


class StaticBuffers:
    """Everything a step reads, and the logits it writes."""

    def __init__(self, shape: StaticShape, device: torch.device) -> None:
        rows = shape.max_rows
        self.shape = shape
        # Token ids, positions and cells.
        self.tokens = _Mirrored(3, rows, dtype=torch.int64, device=device)
        self.used = _Mirrored(rows, dtype=torch.int32, device=device)
        self.pages = _Mirrored(rows, shape.max_pages, dtype=torch.int32, device=device)
        self.tiles = _Mirrored(1 + 3 * rows, dtype=torch.int32, device=device)
        self.cumulative = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.logits = torch.zeros(rows, shape.vocab_size, device=device)
        self._allocations: list[Allocation | None] = [None] * rows
        self.pages.host.fill_(shape.scratch_cell // shape.page_size)
        self.pages.send()

    def fill(self, rows: Sequence[Row], entries: Sequence[int | None]) -> None:
        """Write the rows and the table entry of each one's adapter; the rest is padding."""
        idle = self.shape.max_rows - len(rows)
        padded = [*rows, *[None] * idle]
        scratch = self.shape.scratch_cell
        self.tokens.host.copy_(
            torch.tensor(
                [
                    [0 if row is None else row.token_id for row in padded],
                    [0 if row is None else row.position for row in padded],
                    [scratch if r is None else r.allocation.cell(r.position) for r in padded],
                ]
            )
        )
        used = [1 if row is None else row.position + 1 for row in padded]
        self.used.host.copy_(torch.tensor(used))
        segments = ((entry, len(list(same))) for entry, same in groupby(entries))
        tiles = tiles_of(segments, SHORT)
        self.tiles.host[: len(tiles)] = torch.tensor(tiles)
        for mirrored in (self.tokens, self.used, self.tiles):
            mirrored.send()
        self._fill_pages([None if row is None else row.allocation for row in padded])

    def _fill_pages(self, allocations: Sequence[Allocation | None]) -> None:
        """Only rows whose sequence has changed: an allocation is for life."""
        page_size, changed = self.shape.page_size, False
        for number, allocation in enumerate(allocations):
            if allocation is not self._allocations[number]:
                changed = True
                self._allocations[number] = allocation
                starts = (self.shape.scratch_cell,) if allocation is None else allocation.starts
                pages = torch.tensor([start // page_size for start in starts])
                self.pages.host[number, : len(starts)] = pages
        if changed:
            self.pages.send()


class StaticStep:
    """Runs the model on the first `num_rows` rows of the buffers, with or without deltas."""

    def __init__(
        self,
        model: PreTrainedModel,
        site: DeltaSite,
        cache: KVCache,
        buffers: StaticBuffers,
        tables: AddressTables,
        *,
        paged_kernel: bool,
    ) -> None:
        self.buffers = buffers
        self.tables = tables
        self.device = model.device
        self._model = model
        self._site = site
        self._cache = cache
        self._kernel: Callable[[PagedTables], StaticKernel] = (
            PagedKernel if paged_kernel else GatheredPages
        )

    @torch.inference_mode()
    def run(self, num_rows: int, *, deltas: bool) -> None:
        """Compute `buffers.logits[:num_rows]`."""
        buffers = self.buffers
        ids, positions, cells = buffers.tokens.device[:, :num_rows]
        tables = PagedTables(
            cumulative=buffers.cumulative[: num_rows + 1],
            used=buffers.used.device[:num_rows],
            block_table=buffers.pages.device[:num_rows],
            max_new=1,
            max_total=buffers.shape.max_pages * buffers.shape.page_size,
            page_size=buffers.shape.page_size,
        )
        step = StaticAttention(
            spans=(), cells=cells, cache=self._cache, kernel=self._kernel(tables)
        )
        if deltas:
            self._site.static = TableDeltas(self.tables, buffers.tiles.device, num_rows)
        try:
            with attending(step):
                logits = forward(self._model, ids[None], positions[None], 0)
        finally:
            self._site.static = None
        buffers.logits[:num_rows].copy_(logits)
