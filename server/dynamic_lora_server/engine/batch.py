"""The tensors of one step, built from the scheduled pieces."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import torch

from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.rows import RowSegment
from dynamic_lora_adapters.segments import DeltaPlan, slot_order
from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.engine.scheduler import Piece

# Neighbouring rows, and whose they are; None is the base.
_Owners = list[tuple[ResidentAdapter | None, int]]


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
    KV cell each token is written to; logit_rows [num_scored], the rows whose
    logits are needed, for each of `scored` as many as it scores, in their order. `plan` is
    for all rows, `head_plan` for those of `logit_rows`.
    """

    pieces: list[Piece]
    scored: list[Piece]
    spans: list[Span]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cells: torch.Tensor
    logit_rows: torch.Tensor
    plan: DeltaPlan
    head_plan: DeltaPlan
    segments: tuple[RowSegment, ...]

    @classmethod
    def build(
        cls,
        pieces: Seq[Piece],
        device: torch.device,
        merged: ResidentAdapter | None = None,
        unread: UnreadTokens | None = None,
    ) -> "Batch":
        """Sort the pieces by adapter and lay their tokens out in one row.

        `merged` is the adapter that the weights hold, `unread` has the tokens of
        sequences whose last one is not read yet.
        """
        ordered = sorted(pieces, key=lambda piece: slot_order(piece.sequence.adapter, merged))
        owners = [_owners(piece) for piece in ordered]
        scored = [piece for piece in ordered if piece.num_scored]
        tokens: list[int] = []
        positions: list[int] = []
        cells: list[int] = []
        spans: list[Span] = []
        logit_rows: list[int] = []
        unread_rows: list[tuple[int, int]] = []
        for piece in ordered:
            sequence, start = piece.sequence, piece.sequence.num_computed
            stop = start + piece.num_tokens
            allocation = sequence.allocation
            assert allocation is not None, "a scheduled sequence has cells"
            spans.append(
                Span(len(tokens), piece.num_tokens, start, allocation.starts, allocation.chunk_size)
            )
            if sequence.num_unread:
                unread_rows.append((len(tokens), sequence.id))
                tokens.append(0)
            else:
                tokens += [*sequence.tokens(start, start + piece.num_pending), *piece.draft]
            positions += range(start, stop)
            cells += allocation.cells(start, stop)
            logit_rows += range(len(tokens) - piece.num_scored, len(tokens))
        input_ids = to_device(tokens, device)
        if unread_rows:
            assert unread is not None, "a token that nobody has"
            unread.put(input_ids, unread_rows)
        return cls(
            pieces=ordered,
            scored=scored,
            spans=spans,
            input_ids=input_ids[None],
            position_ids=to_device([positions], device),
            cells=to_device(cells, device),
            logit_rows=to_device(logit_rows, device, torch.long),
            plan=DeltaPlan.of(chain.from_iterable(owners), merged),
            head_plan=DeltaPlan.of(
                chain.from_iterable(map(_owners_of_scored, ordered, owners)), merged
            ),
            segments=_segments(ordered, owners, spans),
        )


def _owners(piece: Piece) -> _Owners:
    """Who acts on the piece's rows: the base before the adapter's invocation, then the adapter."""
    sequence = piece.sequence
    idle = min(max(sequence.active_from - sequence.num_computed, 0), piece.num_tokens)
    owners: _Owners = [(None, idle)] if idle else []
    if idle < piece.num_tokens:
        owners.append((sequence.adapter, piece.num_tokens - idle))
    return owners


def _owners_of_scored(piece: Piece, owners: _Owners) -> _Owners:
    """The same for the rows at its end whose logits are needed."""
    left = piece.num_scored
    if left == piece.num_tokens:
        return owners
    scored: _Owners = []
    for owner, count in reversed(owners):
        if min(count, left):
            scored.insert(0, (owner, min(count, left)))
        left -= min(count, left)
    return scored


def _segments(pieces: Seq[Piece], owners: Seq[_Owners], spans: Seq[Span]) -> tuple[RowSegment, ...]:
    segments = []
    for piece, owned, span in zip(pieces, owners, spans, strict=True):
        adapter = piece.sequence.adapter
        if adapter is not None and adapter.rows is not None:
            idle = sum(n for owner, n in owned if owner is None)
            rows = slice(span.row + idle, span.row + span.num_new)
            if rows.start < rows.stop:
                segments.append(RowSegment(adapter.rows, rows, span.num_cached + idle))
    return tuple(segments)
