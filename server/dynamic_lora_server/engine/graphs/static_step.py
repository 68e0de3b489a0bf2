"""A decoding step of fixed shape: the same tensors every time, filled anew before each.

Rows that no sequence fills are padding: they read and write one page that
belongs to nobody. Capturing this step makes a CUDA graph; run as it is, it is
a step like any other.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.layers import DeltaSite
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.tables import AddressTables, TableDeltas
from dynamic_lora_adapters.tiles import SHORT, tiles_of
from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.attention.packed import attending
from dynamic_lora_server.engine.attention.paged import PagedTables
from dynamic_lora_server.engine.graphs.compiled_layers import CompiledLayers
from dynamic_lora_server.engine.graphs.static_attention import StaticAttention, StaticKernel
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.kv.space import Allocation
from dynamic_lora_server.engine.probe import forward


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


class StaticBuffers:
    """Everything a step reads, and the logits it writes; all of it on the device.

    A step may be filled in while the one before is still on its way: the copies are
    queued behind it.
    """

    def __init__(self, shape: StaticShape, device: torch.device) -> None:
        rows = shape.max_rows
        self.shape = shape
        # Token ids, positions and cells.
        self.tokens = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.used = torch.zeros(rows, dtype=torch.int32, device=device)
        self.tiles = torch.zeros(1 + 3 * rows, dtype=torch.int32, device=device)
        self.cumulative = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.logits = torch.zeros(rows, shape.vocab_size, device=device)
        self._allocations: list[Allocation | None] = [None] * rows
        scratch_page = shape.scratch_cell // shape.page_size
        self._pages = torch.full((rows, shape.max_pages), scratch_page, dtype=torch.int32)
        self.pages = self._pages.to(device, copy=True)

    @property
    def token_ids(self) -> torch.Tensor:
        """The token of each row, [max_rows], int64."""
        return self.tokens[0]

    def fill(self, rows: Sequence[Row], entries: Sequence[int | None]) -> None:
        """Write the rows and the table entry of each one's adapter; the rest is padding."""
        idle = self.shape.max_rows - len(rows)
        padded = [*rows, *[None] * idle]
        scratch = self.shape.scratch_cell
        tokens = [
            [0 if row is None else row.token_id for row in padded],
            [0 if row is None else row.position for row in padded],
            [scratch if row is None else row.allocation.cell(row.position) for row in padded],
        ]
        used = [1 if row is None else row.position + 1 for row in padded]
        segments = ((entry, len(list(same))) for entry, same in groupby(entries))
        tiles = tiles_of(segments, SHORT)
        _send(tokens, self.tokens)
        _send(used, self.used)
        _send(tiles, self.tiles[: len(tiles)])
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
                self._pages[number, : len(starts)] = pages
        if changed:
            _send(self._pages, self.pages)


def _send(values: object, target: torch.Tensor) -> None:
    target.copy_(to_device(values, target.device, target.dtype))


class StaticStep:
    """Runs the model on the first `num_rows` rows of the buffers, with or without deltas.

    `kernel` attends to the pages that tables name. `layers`, if there are any, run in the
    place of the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        site: DeltaSite,
        cache: KVCache,
        buffers: StaticBuffers,
        tables: AddressTables,
        kernel: Callable[[PagedTables], StaticKernel],
    ) -> None:
        self.layers: CompiledLayers | None = None
        self.buffers = buffers
        self.tables = tables
        self.device = model.device
        self._model = model
        self._site = site
        self._cache = cache
        self._kernel = kernel

    @torch.inference_mode()
    def run(self, num_rows: int, *, deltas: bool) -> None:
        """Compute `buffers.logits[:num_rows]`."""
        buffers = self.buffers
        ids, positions, cells = buffers.tokens[:, :num_rows]
        tables = PagedTables(
            cumulative=buffers.cumulative[: num_rows + 1],
            used=buffers.used[:num_rows],
            block_table=buffers.pages[:num_rows],
            max_new=1,
            max_total=buffers.shape.max_pages * buffers.shape.page_size,
            page_size=buffers.shape.page_size,
        )
        step = StaticAttention(
            spans=(), cells=cells, cache=self._cache, kernel=self._kernel(tables)
        )
        if deltas:
            self._site.static = TableDeltas(self.tables, buffers.tiles, num_rows)
        try:
            with attending(step), self.layers.in_place() if self.layers else nullcontext():
                logits = forward(self._model, ids[None], positions[None], 0)
        finally:
            self._site.static = None
        buffers.logits[:num_rows].copy_(logits)
