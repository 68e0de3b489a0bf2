"""Bookkeeping of KV-cache space; the tensors are in `cache`. Imports no torch.

Space is counted in *cells*: one cell holds the keys and values of one token in
every layer. Two layouts share one contract:

    contiguous  |--- seq 1 ---|free|-- seq 2 --|...   one region per sequence (CPU)
    paged       |1|2|1|free|2|...                     pages of equal size (CUDA)

A sequence's whole need is reserved when it is admitted, so a running sequence
is never evicted for lack of space. Regions may be moved between two steps, or what is
free between them would lie waste: with lengths that differ up to a third of all cells.
"""

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Allocation:
    """Cells of one sequence: position p lies in chunk p // chunk_size."""

    starts: tuple[int, ...]  # first cell of each chunk
    chunk_size: int
    num_cells: int  # the positions that may be used

    def cell(self, position: int) -> int:
        """The cell of a position."""
        chunk, offset = divmod(position, self.chunk_size)
        return self.starts[chunk] + offset

    def cells(self, start: int, stop: int) -> list[int]:
        """The cells of positions `start:stop`."""
        return [self.cell(position) for position in range(start, stop)]

    def filled(self, num_tokens: int) -> dict[int, int]:
        """How many cells of each chunk, by its first one, the first `num_tokens` positions take."""
        chunks = enumerate(self.starts[: -(-num_tokens // self.chunk_size)])
        sizes = {start: num_tokens - index * self.chunk_size for index, start in chunks}
        return {start: min(size, self.chunk_size) for start, size in sizes.items()}


@dataclass(frozen=True, slots=True)
class Move:
    """The region that began at `source` begins at `target`; its cells are to be copied there."""

    source: int
    target: int


class KVSpace(ABC):
    """Hands out cells. `can_allocate` changes nothing; `allocate` must be preceded by it."""

    num_cells: int

    @property
    @abstractmethod
    def num_free(self) -> int:
        """Cells that no sequence holds."""

    @abstractmethod
    def can_allocate(self, num_tokens: int) -> bool:
        """Whether `allocate(num_tokens)` would succeed now."""

    @abstractmethod
    def allocate(self, num_tokens: int) -> Allocation:
        """Reserve cells for `num_tokens` positions."""

    def make_gap(self, num_tokens: int) -> list[Move]:
        """Make `allocate(num_tokens)` possible if so many cells are free, wherever they are.

        Returns what moved for it, in this order, all of it towards lower cells. Allocations
        of the caller's must follow.
        """
        del num_tokens  # free pages are as good anywhere
        return []

    @abstractmethod
    def free(self, allocation: Allocation) -> None:
        """Give the cells back."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise RuntimeError if free and held cells do not add up."""


class ContiguousSpace(KVSpace):
    """First fit over free regions, neighbours joined on free."""

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self._gaps: list[tuple[int, int]] = [(0, num_cells)]  # (start, length), by start
        self._held: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self._gaps)

    def can_allocate(self, num_tokens: int) -> bool:
        return any(length >= num_tokens for _, length in self._gaps)

    def allocate(self, num_tokens: int) -> Allocation:
        for index, (start, length) in enumerate(self._gaps):
            if length >= num_tokens:
                rest = (start + num_tokens, length - num_tokens)
                self._gaps[index : index + 1] = [rest] if rest[1] else []
                self._held[start] = num_tokens
                return Allocation((start,), num_tokens, num_tokens)
        raise RuntimeError(f"no gap of {num_tokens} cells; ask can_allocate first")

    def make_gap(self, num_tokens: int) -> list[Move]:
        if self.can_allocate(num_tokens) or self.num_free < num_tokens:
            return []
        first, last = self._cheapest_gaps(num_tokens)
        position, end = self._gaps[first][0], sum(self._gaps[last])
        moves = []
        for start in sorted(start for start in self._held if position < start < end):
            moves.append(Move(start, position))
            self._held[position] = self._held.pop(start)
            position += self._held[position]
        self._gaps[first : last + 1] = [(position, end - position)]
        return moves

    def _cheapest_gaps(self, num_tokens: int) -> tuple[int, int]:
        """First and last of neighbours that are large enough, with the fewest cells between them.

        There must be so many free cells.
        """
        found: list[tuple[int, int, int]] = []
        for first, (start, _) in enumerate(self._gaps):
            free = 0
            for last in range(first, len(self._gaps)):
                free += self._gaps[last][1]
                if free >= num_tokens:
                    found.append((sum(self._gaps[last]) - start - free, first, last))
                    break
        _, first, last = min(found)
        return first, last

    def free(self, allocation: Allocation) -> None:
        start = allocation.starts[0]
        length = self._held.pop(start)
        insort(self._gaps, (start, length))
        joined: list[tuple[int, int]] = []
        for gap in self._gaps:
            if joined and sum(joined[-1]) == gap[0]:
                joined[-1] = (joined[-1][0], joined[-1][1] + gap[1])
            else:
                joined.append(gap)
        self._gaps = joined

    def check_integrity(self) -> None:
        edges = sorted([*self._gaps, *self._held.items()])
        position = 0
        for start, length in edges:
            if start != position or length <= 0:
                raise RuntimeError(f"cells lost or held twice at {position}")
            position += length
        if position != self.num_cells:
            raise RuntimeError(f"{self.num_cells - position} cells are lost")


class PagedSpace(KVSpace):
    """Pages of `page_size` cells from a free list, the first at `first_cell`.

    A page, named by its first cell, may have several holders; it is free again
    when the last of them has let it go.
    """

    def __init__(self, num_pages: int, page_size: int, *, first_cell: int = 0) -> None:
        self.num_cells = num_pages * page_size
        self.page_size = page_size
        self._pages = range(first_cell, first_cell + self.num_cells, page_size)
        self._free = list(reversed(self._pages))
        self._holders: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) * self.page_size

    def can_allocate(self, num_tokens: int) -> bool:
        return not self.num_missing(num_tokens)

    def num_missing(self, num_tokens: int, *, num_shared: int = 0) -> int:
        """Pages that must become free before `num_tokens` can be allocated.

        The first `num_shared` of theirs are there already.
        """
        return max(self._pages_for(num_tokens) - num_shared - len(self._free), 0)

    def allocate(self, num_tokens: int, shared: Sequence[int] = ()) -> Allocation:
        """Reserve cells for `num_tokens` positions, the first in `shared` pages that others hold.

        Raises RuntimeError if there are too few free pages for the rest.
        """
        count = self._pages_for(num_tokens) - len(shared)
        if count > len(self._free):
            raise RuntimeError(f"no {count} free pages; ask can_allocate first")
        own = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(own, 1))
        for start in shared:
            self.hold(start)
        return Allocation((*shared, *own), self.page_size, num_tokens)

    def free(self, allocation: Allocation) -> None:
        for start in allocation.starts:
            self.let_go(start)

    def adopt(self, allocation: Allocation, starts: Sequence[int]) -> Allocation:
        """The allocation with its first pages given back in exchange for these, held by others."""
        for own, shared in zip(allocation.starts, starts, strict=False):
            self.hold(shared)
            self.let_go(own)
        return replace(allocation, starts=(*starts, *allocation.starts[len(starts) :]))

    def hold(self, start: int) -> None:
        """Become one more holder of a page that is not free."""
        self._holders[start] += 1

    def let_go(self, start: int) -> None:
        """Stop holding a page."""
        self._holders[start] -= 1
        if not self._holders[start]:
            del self._holders[start]
            self._free.append(start)

    def num_holders(self, start: int) -> int:
        """How many hold a page."""
        return self._holders.get(start, 0)

    def check_integrity(self) -> None:
        if sorted([*self._free, *self._holders]) != list(self._pages):
            raise RuntimeError("pages are lost or held twice")
        if not all(count > 0 for count in self._holders.values()):
            raise RuntimeError("a page without holders is not free")

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
