"""The tensors of one step, built from the scheduled pieces."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.segments import DeltaPlan, slot_order
from dynamic_lora_server.engine.scheduler import Piece


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in the packed batch and its place in the KV cache.

    Rows `row:row + num_new` are its new tokens, at positions
    `num_cached:num_cached + num_new`.
    """

    row: int
    num_new: int
    num_cached: int
    starts: tuple[int, ...]  # first cell of each chunk of its KV allocation
    chunk_size: int

    @property
    def num_total(self) -> int:
        """Tokens in the cache once this step has written."""
        return self.num_cached + self.num_new


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed row of tokens, sorted by adapter slot.

    Shapes: input_ids, position_ids [1, num_tokens]; cells [num_tokens], the
    KV cell each token is written to; logit_rows [num_sampled], the rows whose
    logits are needed, in the order of `sampled`.
    """

    pieces: list[Piece]
    sampled: list[Piece]
    spans: list[Span]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cells: torch.Tensor
    logit_rows: torch.Tensor
    plan: DeltaPlan

    @classmethod
    def build(cls, pieces: Seq[Piece], device: torch.device) -> "Batch":
        """Sort the pieces by adapter and lay their tokens out in one row."""
        ordered = sorted(pieces, key=lambda piece: slot_order(piece.sequence.adapter))
        tokens: list[int] = []
        positions: list[int] = []
        cells: list[int] = []
        spans: list[Span] = []
        logit_rows: list[int] = []
        for piece in ordered:
            sequence, start = piece.sequence, piece.sequence.num_computed
            stop = start + piece.num_tokens
            allocation = sequence.allocation
            assert allocation is not None, "a scheduled sequence has cells"
            spans.append(
                Span(len(tokens), piece.num_tokens, start, allocation.starts, allocation.chunk_size)
            )
            tokens += sequence.tokens(start, stop)
            positions += range(start, stop)
            cells += allocation.cells(start, stop)
            if piece.samples:
                logit_rows.append(len(tokens) - 1)
        return cls(
            pieces=ordered,
            sampled=[piece for piece in ordered if piece.samples],
            spans=spans,
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            cells=torch.tensor(cells, device=device),
            logit_rows=torch.tensor(logit_rows, dtype=torch.long, device=device),
            plan=DeltaPlan.of([(p.sequence.adapter, p.num_tokens) for p in ordered]),
        )
