"""Where the members of a projection group have their factors among the group's."""

from functools import lru_cache
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """Where a member's factors lie in its group's: ranks `start` to `stop`, columns `column` to
    `end` of b."""

    number: int
    start: int
    stop: int
    column: int
    end: int


@lru_cache(maxsize=256)
def spans(widths: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Span, ...]:
    """Where members of these widths and ranks lie; layers of a model have few different ones."""
    found, row, column = [], 0, 0
    for number, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
        if rank:
            found.append(Span(number, row, row + rank, column, column + width))
        row, column = row + rank, column + width
    return tuple(found)


@lru_cache(maxsize=256)
def reach(spans: tuple[Span, ...], num_rows: int) -> torch.Tensor:
    """`columns` of a group with so many rows. Only to be read."""
    reached = torch.zeros(num_rows, 2, dtype=torch.long)
    for span in spans:
        reached[span.start : span.stop] = torch.tensor([span.column, span.end])
    return reached
