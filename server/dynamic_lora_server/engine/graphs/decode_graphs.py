"""Decoding steps replayed as CUDA graphs: one launch instead of hundreds.

A step of nothing but decoding rows has the same shape every time but for its
number of rows. For a few such numbers the step is captured at start, once
without deltas and once with; a batch takes the next larger one and the rest of
it is padding. What a graph cannot hold runs as any other step does, and is
counted by its reason.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_server.engine.graphs.static_step import Row, StaticStep
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.engine.scheduler import Piece
from dynamic_lora_server.engine.sequence import Phase

logger = logging.getLogger(__name__)


@contextmanager
def refusing_waits() -> Iterator[None]:
    """While the block lasts, what waits for a CUDA device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():  # torch calls the mode a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStats:
    """How many steps were replayed, and how many were not, by reason."""

    num_replayed: int
    num_declined: Mapping[str, int]


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture: 1, 2, 4, then every eighth up to `max_rows`."""
    eighths = range(8, max_rows + 8, 8)
    return sorted({min(size, max_rows) for size in (1, 2, 4, *eighths)})


class DecodeGraphs:
    """Runs steps of decoding rows at fixed sizes; captured where `capture` was called.

    Without it the same steps run uncaptured, which is how they are tested
    where there is no CUDA. `deltas` says whether steps with adapters can run
    this way (they need Triton).
    """

    def __init__(self, step: StaticStep, *, deltas: bool) -> None:
        self._step = step
        self._deltas = deltas
        self._sizes = graph_sizes(step.buffers.shape.max_rows)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._declined: Counter[str] = Counter()
        self._num_replayed = 0

    def capture(self, on_graph: Callable[[int, int], object]) -> None:
        """Capture every size, largest first, so that the smaller ones fit its memory.

        `on_graph` is told how many are done, of how many. Raises RuntimeError
        where the model does something that a graph cannot hold.
        """
        kinds = [(n, d) for n in reversed(self._sizes) for d in (False, True)[: 1 + self._deltas]]
        self._step.buffers.fill((), ())
        pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace for every stream that it has seen.
        side = torch.cuda.Stream(self._step.device)
        graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        for done, kind in enumerate(kinds):
            on_graph(done, len(kinds))
            graphs[kind] = self._captured(*kind, pool, side)
        self._graphs = graphs

    def run(
        self,
        pieces: Sequence[Piece],
        merged: ResidentAdapter | None,
        unread: UnreadTokens | None = None,
    ) -> torch.Tensor | None:
        """Logits [num_pieces, vocab] in float32, in the order of `pieces`; None if declined.

        The pieces are sorted by slot. The logits are overwritten by the next step.
        """
        if any(piece.sequence.phase is not Phase.DECODE for piece in pieces):
            self._decline("prompts")
            return None
        if any(piece.draft for piece in pieces):
            self._decline("drafts")
            return None
        rows = [_row(piece, merged) for piece in pieces]
        adapters = list(dict.fromkeys(row.adapter for row in rows if row.adapter is not None))
        reason = self._refusal(pieces, adapters, merged)
        if reason is not None:
            self._decline(reason)
            return None
        self._num_replayed += 1
        self._fill(pieces, rows, adapters, unread)
        size = next(size for size in self._sizes if size >= len(rows))
        self._replay(size, bool(adapters))
        return self._step.buffers.logits[: len(rows)]

    def _fill(
        self,
        pieces: Sequence[Piece],
        rows: Sequence[Row],
        adapters: Sequence[ResidentAdapter],
        unread: UnreadTokens | None,
    ) -> None:
        buffers = self._step.buffers
        entries = dict(zip(adapters, self._step.tables.entries(adapters), strict=True))
        buffers.fill(rows, [None if row.adapter is None else entries[row.adapter] for row in rows])
        sequences = enumerate(piece.sequence for piece in pieces)
        wanted = [(row, sequence.id) for row, sequence in sequences if sequence.num_unread]
        if wanted:
            assert unread is not None, "a token that nobody has"
            unread.put(buffers.token_ids, wanted)

    def stats(self) -> GraphStats:
        """Counts since the start."""
        return GraphStats(num_replayed=self._num_replayed, num_declined=dict(self._declined))

    def _decline(self, reason: str) -> None:
        self._declined[reason] += 1
        logger.debug("A step runs without a graph: %s", reason)

    def _refusal(
        self,
        pieces: Sequence[Piece],
        adapters: Sequence[ResidentAdapter],
        merged: ResidentAdapter | None,
    ) -> str | None:
        if len(pieces) > self._sizes[-1]:
            return "too many rows"
        if merged is not None:
            if any(piece.sequence.adapter is not merged for piece in pieces):
                return "differences to what is merged"
            return self._step.tables.merged_refusal(merged)
        if adapters and not self._deltas:
            return "adapters without Triton"
        return next(filter(None, map(self._step.tables.refusal, adapters)), None)

    def _replay(self, size: int, deltas: bool) -> None:
        graph = self._graphs.get((size, deltas))
        if graph is None:
            self._step.run(size, deltas=deltas)
        else:
            graph.replay()

    def _captured(
        self, size: int, deltas: bool, pool: Any, side: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        before = torch.cuda.current_stream(self._step.device)
        # What is compiled or allocated for good at a first run must not be captured.
        side.wait_stream(before)
        with torch.cuda.stream(side):
            self._step.run(size, deltas=deltas)
            # Refused here, a model that waits leaves no broken capture behind.
            with refusing_waits():
                self._step.run(size, deltas=deltas)
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side):
                self._step.run(size, deltas=deltas)
        except BaseException:
            # Where to end the capture fails too, torch stays on the capture's stream.
            torch.cuda.set_stream(before)
            raise
        return graph


def _row(piece: Piece, merged: ResidentAdapter | None) -> Row:
    """The next token of a decoding sequence; what is merged needs no deltas."""
    sequence = piece.sequence
    position = sequence.num_computed
    allocation = sequence.allocation
    assert allocation is not None, "a scheduled sequence has cells"
    adapter = None if position < sequence.active_from else sequence.adapter
    # One that is not read yet is put there by the device.
    (token_id,) = sequence.tokens(position, position + 1) or (0,)
    return Row(token_id, position, allocation, None if adapter is merged else adapter)
