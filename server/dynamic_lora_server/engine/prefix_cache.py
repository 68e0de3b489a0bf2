"""Which beginnings of prompts are in the KV cache, and where. Imports no torch.

A prompt is cut into blocks of a few tokens. A block's key is a hash of all that
its keys and values depend on: the tokens up to its end and what computed them,
adapter by adapter. Equal keys therefore mean equal content, and nothing else is
ever found under a key (the chained hashes of vLLM's automatic prefix caching,
with the adapter's content in every link).

Blocks lie in pages. In a paged KV space these are the pages of the sequences
themselves: a full page is shared by all that begin with it, and what is known
of a page in part is copied. Where every sequence has one region, pages of one
block each are set aside, and all is copied.
"""

from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from dynamic_lora_server.engine.kv_space import Allocation, PagedSpace

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
    token_ids: Sequence[int], *, block_size: int, owner: str | None, active_from: int = 0
) -> tuple[bytes, ...]:
    """The keys of a prompt's full blocks.

    `owner` is the digest of the adapter that acts on the tokens from position
    `active_from` on; None is the base model, which also owns all blocks before
    that position. Where in its block an adapter begins to act is part of the key.
    """
    keys = []
    parent = _ROOT
    for start in range(0, len(token_ids) - block_size + 1, block_size):
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
        self._shared = shared
        self._max_pages = pages.num_cells // pages.page_size if max_pages is None else max_pages
        self._blocks_per_page = pages.page_size // block_size
        self._page_of: dict[bytes, int] = {}
        # The keys in each page, the least recently used page first. A prompt's
        # later pages stand before its earlier ones: no use without those.
        self._keys_in: OrderedDict[int, list[bytes]] = OrderedDict()
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
        if not self._shared:
            return 0
        pages = list(self._keys_in)  # at once: metrics ask from another thread
        return self._pages.page_size * sum(self._pages.num_holders(page) == 1 for page in pages)

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
        shared = [
            one.start for one in found if self._shared and one.num_blocks == self._blocks_per_page
        ]
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
        self, keys: Sequence[bytes], computed: range, allocation: Allocation
    ) -> list[CellCopy]:
        """Keep the blocks of a prompt that have been computed, as far as there is room."""
        known = (self._page_of.get(key) for key in keys[: computed.stop])
        chain = dict.fromkeys(page for page in known if page is not None)
        self._touch(chain)
        copies: list[CellCopy] = []
        for index in computed:
            if keys[index] in self._page_of:
                continue
            if index and keys[index - 1] not in self._page_of:
                break  # without the block before, nobody would find it
            page = self._page_for(index, allocation, chain)
            if page is None:
                break
            if not self._shared:
                source = allocation.cell(index * self.block_size)
                copies.append(CellCopy(source, page, self.block_size))
            self._page_of[keys[index]] = page
            self._keys_in[page].append(keys[index])
            chain[page] = None
        self._touch(chain)
        return _joined(copies)

    def make_room(self, num_tokens: int, keys: Sequence[bytes]) -> bool:
        """Evict so that the sequences' space has room for a sequence with these keys.

        Whether it has then; nothing is evicted where that would not be enough.
        """
        if not self._shared:
            return False
        num_missing = self._pages.num_missing(num_tokens)
        if self.num_idle_cells < num_missing * self._pages.page_size:
            return False
        self._touch(dict.fromkeys(one.start for one in self.find(keys)))
        return all(self._evict() for _ in range(num_missing))

    def clear(self) -> None:
        """Forget every block. Sequences keep the pages that they share."""
        for page in self._keys_in:
            self._pages.let_go(page)
        self._keys_in.clear()
        self._page_of.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError if blocks and pages do not add up."""
        pairs = {key: page for page, keys in self._keys_in.items() for key in keys}
        num_keys = sum(map(len, self._keys_in.values()))
        if pairs != self._page_of or num_keys != len(pairs) or not all(self._keys_in.values()):
            raise RuntimeError("blocks and their pages disagree")
        if not all(self._pages.num_holders(page) for page in self._keys_in):
            raise RuntimeError("a page of the prefix cache is free")
        if not self._shared:
            self._pages.check_integrity()
            held = self._pages.num_cells - self._pages.num_free
            if held != len(self._keys_in) * self._pages.page_size:
                raise RuntimeError("pages of the prefix cache are lost")

    def _page_for(self, index: int, allocation: Allocation, chain: Collection[int]) -> int | None:
        """The page to keep a block in; None if there is no room but in pages of the same prompt."""
        if self._shared:
            page = allocation.starts[index // self._blocks_per_page]
            if page in self._keys_in:
                return page
            if len(self._keys_in) >= self._max_pages and not self._evict(chain):
                return None
            self._pages.hold(page)
        else:
            page_size = self._pages.page_size
            if not self._pages.can_allocate(page_size) and not self._evict(chain):
                return None
            page = self._pages.allocate(page_size).starts[0]
        self._keys_in[page] = []
        return page

    def _evict(self, spared: Collection[int] = ()) -> bool:
        """Give up the page used longest ago that no sequence holds; False if there is none."""
        for page in self._keys_in:
            if self._pages.num_holders(page) == 1 and page not in spared:
                break
        else:
            return False
        for key in self._keys_in.pop(page):
            del self._page_of[key]
            self._num_evictions += 1
        self._pages.let_go(page)
        return True

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
