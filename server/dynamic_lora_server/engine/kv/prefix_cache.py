"""Which beginnings of prompts are in the KV cache, and where. Imports no torch.

Tokens are cut into blocks of a few. A block's key is a hash of all that its keys
and values depend on: the tokens up to its end and what computed them, adapter by
adapter, whether as a prompt or as an answer. Equal keys therefore mean equal content,
and nothing else is ever found under a key (the chained hashes of vLLM's automatic
prefix caching, with the adapter's content in every link).

Blocks lie in pages. In a paged KV space these are the pages of the sequences
themselves: a full page is shared by all that begin with it, and what is known
of a page in part is copied. Where every sequence has one region, pages of one
block each are set aside, and all is copied.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from dynamic_lora_server.engine.kv.space import Allocation, PagedSpace

BLOCK_SIZE = 16

_ROOT = bytes(32)


@dataclass(frozen=True, slots=True)
class CellCopy:
    """A run of cells whose keys and values are to be copied to another place."""

    source: int  # first cell of the run
    target: int
    num_cells: int


@dataclass(frozen=True, slots=True)
class Found:
    """The first `num_blocks` blocks of a page's worth of prompt, in the page at `start`."""

    start: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """Counts of one cache. The hit rate is `num_reused / num_looked_up`, both in prompt tokens."""

    num_looked_up: int = 0
    num_reused: int = 0
    num_blocks: int = 0  # held now
    num_evictions: int = 0  # blocks given up for others


def block_keys(
    token_ids: Sequence[int],
    *,
    block_size: int,
    owner: str | None,
    active_from: int = 0,
    known: tuple[bytes, ...] = (),
) -> tuple[bytes, ...]:
    """The keys of the full blocks of these tokens, of which the first may be `known`.

    `owner` is the digest of the adapter that acts on the tokens from position
    `active_from` on; None is the base model, which also owns all blocks before
    that position. Where in its block an adapter begins to act is part of the key.
    """
    keys = list(known)
    parent = known[-1] if known else _ROOT
    for start in range(len(known) * block_size, len(token_ids) - block_size + 1, block_size):
        idle = min(max(active_from - start, 0), block_size)
        acting = None if owner is None or idle == block_size else (owner, idle)
        # The digest before and the tokens after have fixed lengths: no two blocks read the same.
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = sha256(parent + repr(acting).encode() + tokens).digest()
        keys.append(parent)
    return tuple(keys)


class PrefixCache:
    """Blocks by key, least recently used pages evicted first, never one that a sequence holds.

    `pages` are the pages to keep blocks in; with `shared` they are those that
    sequences have their tokens in, of which at most `max_pages` are kept.
    What the methods tell to copy must be copied before the next step writes.
    """

    def __init__(
        self,
        pages: PagedSpace,
        *,
        block_size: int = BLOCK_SIZE,
        shared: bool,
        max_pages: int | None = None,
    ) -> None:
        assert pages.page_size % block_size == 0, "blocks fill pages"
        assert shared or pages.page_size == block_size, "pages set aside hold one block each"
        self.block_size = block_size
        self._pages = pages
        self.shared = shared
        self._max_pages = pages.num_cells // pages.page_size if max_pages is None else max_pages
        self._blocks_per_page = pages.page_size // block_size
        self._page_of: dict[bytes, int] = {}
        # The keys in each page, the least recently used page first. A prompt's
        # later pages stand before its earlier ones: no use without those.
        self._keys_in: OrderedDict[int, list[bytes]] = OrderedDict()
        self._left_by: dict[int, str | None] = {}  # whose sequences left the blocks of each page
        self._num_looked_up = 0
        self._num_reused = 0
        self._num_evictions = 0

    @classmethod
    def off(cls) -> "PrefixCache":
        """A cache that keeps nothing."""
        return cls(PagedSpace(0, BLOCK_SIZE), shared=False)

    @property
    def enabled(self) -> bool:
        """Whether there is room to keep anything."""
        return self._max_pages > 0

    @property
    def num_idle_cells(self) -> int:
        """Cells of the sequences' own space that are held for nobody but later prompts."""
        if not self.shared:
            return 0
        # At once: metrics ask from another thread.
        return self._pages.page_size * self._num_idle(list(self._keys_in))

    def stats(self) -> PrefixStats:
        """Counts at this moment."""
        return PrefixStats(
            num_looked_up=self._num_looked_up,
            num_reused=self._num_reused,
            num_blocks=len(self._page_of),
            num_evictions=self._num_evictions,
        )

    def count(self, *, num_looked_up: int, num_reused: int) -> None:
        """Count one prompt that was looked up, in tokens."""
        self._num_looked_up += num_looked_up
        self._num_reused += num_reused

    def num_known(self, keys: Sequence[bytes]) -> int:
        """About how many of these blocks, from the first on, are held.

        By a few lookups: where a block is held, so are nearly always those before it.
        """
        return bisect_left(keys, True, key=lambda key: key not in self._page_of)

    def find(self, keys: Sequence[bytes]) -> list[Found]:
        """The longest known beginning of a prompt, page by page; all but the last are full."""
        found = []
        for first in range(0, len(keys), self._blocks_per_page):
            span = keys[first : first + self._blocks_per_page]
            # A page is filled from its beginning on, so its deepest block brings the others.
            known = (n for n in range(len(span), 0, -1) if span[n - 1] in self._page_of)
            num_blocks = next(known, 0)
            if num_blocks:
                found.append(Found(self._page_of[span[num_blocks - 1]], num_blocks))
            if num_blocks < self._blocks_per_page:
                break
        return found

    def reuse(
        self, found: Sequence[Found], allocation: Allocation
    ) -> tuple[Allocation, list[CellCopy]]:
        """Put what was found at the beginning of an allocation, by sharing or by copies."""
        self._touch(dict.fromkeys(one.start for one in found))
        shared = self._full(found) if self.shared else []
        copies = [
            CellCopy(
                one.start,
                allocation.cell(index * self._pages.page_size),
                one.num_blocks * self.block_size,
            )
            for index, one in enumerate(found)
            if index >= len(shared)
        ]
        if shared:
            allocation = self._pages.adopt(allocation, shared)
        return allocation, _joined(copies)

    def keep(
        self,
        keys: Sequence[bytes],
        computed: range,
        allocation: Allocation,
        owner: str | None = None,
    ) -> list[CellCopy]:
        """Keep the blocks of a sequence that have been computed, as far as there is room.

        `owner` is the digest of its adapter.
        """
        known = (self._page_of.get(key) for key in keys[: computed.stop])
        chain = dict.fromkeys(page for page in known if page is not None)
        self._touch(chain)
        new = [index for index in computed if keys[index] not in self._page_of]
        if new and new[0] and keys[new[0] - 1] not in self._page_of:
            return []  # without the block before, nobody would find it
        copies: list[CellCopy] = []
        for index, page in zip(new, self._pages_for(new, allocation, chain), strict=False):
            if not self.shared:
                source = allocation.cell(index * self.block_size)
                copies.append(CellCopy(source, page, self.block_size))
            self._page_of[keys[index]] = page
            self._keys_in[page].append(keys[index])
            self._left_by[page] = owner
            chain[page] = None
        self._touch(chain)
        return _joined(copies)

    def reserve(self, num_tokens: int, keys: Sequence[bytes]) -> Allocation | None:
        """Cells of a sequence with these keys, the first in the full pages that are known.

        Where pages are shared. What is missing beside these is evicted; where that would not
        do nothing is, and None is returned.
        """
        found = self.find(keys)
        pages = self._full(found)
        spared = frozenset(pages)
        num_missing = self._pages.num_missing(num_tokens, num_shared=len(pages))
        others = (page for page in self._keys_in if page not in spared)
        if num_missing and self._num_idle(others) < num_missing:
            return None
        self._touch(dict.fromkeys(one.start for one in found))
        for _ in range(num_missing):
            self._evict(spared)
        return self._pages.allocate(num_tokens, pages)

    def clear(self) -> None:
        """Forget every block. Sequences keep the pages that they share."""
        for page in list(self._keys_in):
            self._let_go(page)

    def drop(self, keys: Sequence[bytes], owner: str | None) -> None:
        """Forget these blocks and all that sequences of an owner left, with the pages they are in.

        Sequences keep the pages that they share.
        """
        known = {self._page_of[key] for key in keys if key in self._page_of}
        for page in known | {page for page, left_by in self._left_by.items() if left_by == owner}:
            self._let_go(page)

    def check_integrity(self) -> None:
        """Raise RuntimeError if blocks and pages do not add up."""
        pairs = {key: page for page, keys in self._keys_in.items() for key in keys}
        num_keys = sum(map(len, self._keys_in.values()))
        if pairs != self._page_of or num_keys != len(pairs) or not all(self._keys_in.values()):
            raise RuntimeError("blocks and their pages disagree")
        if not all(self._pages.num_holders(page) for page in self._keys_in):
            raise RuntimeError("a page of the prefix cache is free")
        if not self.shared:
            self._pages.check_integrity()
            held = self._pages.num_cells - self._pages.num_free
            if held != len(self._keys_in) * self._pages.page_size:
                raise RuntimeError("pages of the prefix cache are lost")

    def _full(self, found: Sequence[Found]) -> list[int]:
        """The pages that are known from end to end."""
        return [one.start for one in found if one.num_blocks == self._blocks_per_page]

    def _num_idle(self, pages: Iterable[int]) -> int:
        """How many of these pages no sequence holds."""
        return sum(self._pages.num_holders(page) == 1 for page in pages)

    def _pages_for(
        self, blocks: Sequence[int], allocation: Allocation, chain: Collection[int]
    ) -> list[int]:
        """The pages to keep new blocks in, by their indices: fewer if there is no more room.

        Pages of the same prompt, the `chain`, do not make room for it.
        """
        if self.shared:
            starts = (allocation.starts[index // self._blocks_per_page] for index in blocks)
            return self._pages_to_share(list(starts), chain)
        # In order, so that many are copied at once: those that are evicted come deepest first.
        pages = sorted(self._pages_aside(len(blocks), chain))
        self._keys_in.update((page, []) for page in pages)
        return pages

    def _pages_to_share(self, wanted: Sequence[int], chain: Collection[int]) -> list[int]:
        """The first of these pages, held now, as many as may be."""
        for number, page in enumerate(wanted):
            if page in self._keys_in:
                continue
            if len(self._keys_in) >= self._max_pages and not self._evict(chain):
                return list(wanted[:number])
            self._pages.hold(page)
            self._keys_in[page] = []
        return list(wanted)

    def _pages_aside(self, number: int, chain: Collection[int]) -> list[int]:
        """Up to so many pages of those that are set aside, of which the oldest are evicted."""
        pages: list[int] = []
        page_size = self._pages.page_size
        while len(pages) < number:
            if not self._pages.can_allocate(page_size) and not self._evict(chain):
                break
            pages += self._pages.allocate(page_size).starts
        return pages

    def _evict(self, spared: Collection[int] = ()) -> bool:
        """Give up the page used longest ago that no sequence holds; False if there is none."""
        for page in self._keys_in:
            if self._pages.num_holders(page) == 1 and page not in spared:
                break
        else:
            return False
        self._num_evictions += len(self._keys_in[page])
        self._let_go(page)
        return True

    def _let_go(self, page: int) -> None:
        for key in self._keys_in.pop(page):
            del self._page_of[key]
        self._left_by.pop(page, None)
        self._pages.let_go(page)

    def _touch(self, chain: Mapping[int, None]) -> None:
        """Mark a prompt's pages, given in its order, as used now."""
        for page in reversed(list(chain)):
            self._keys_in.move_to_end(page)


def _joined(copies: Sequence[CellCopy]) -> list[CellCopy]:
    """The same copies, with runs that go on where the one before ends joined to it."""
    joined: list[CellCopy] = []
    for one in copies:
        last = joined[-1] if joined else CellCopy(0, 0, 0)
        ends = last.source + last.num_cells, last.target + last.num_cells
        if joined and ends == (one.source, one.target):
            joined[-1] = CellCopy(last.source, last.target, last.num_cells + one.num_cells)
        else:
            joined.append(one)
    return joined
