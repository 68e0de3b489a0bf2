"""How the cells of the KV cache are divided between sequences and prefixes. Imports no torch."""

from dataclasses import dataclass

from dynamic_lora_server.engine.kv.prefix_cache import BLOCK_SIZE, PrefixCache
from dynamic_lora_server.engine.kv.space import ContiguousSpace, KVSpace, PagedSpace

# Where cells must be set aside for prefixes, they are this part of all.
_PREFIX_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Who may use which cells; the tables must have `num_cells` of them.

    `aside` are those that only prefixes are copied to.
    """

    space: KVSpace
    prefixes: PrefixCache
    num_cells: int
    aside: range = range(0)


def paged_layout(
    num_cells: int, *, page_size: int, most_used: int, prefix_cells: int | None
) -> KVLayout:
    """Pages that sequences and prefixes share.

    `most_used` is what sequences can need at most, `prefix_cells` what prefixes
    may hold: all pages that no sequence needs if None.
    """
    space = PagedSpace(min(num_cells, most_used) // page_size, page_size)
    max_pages = None if prefix_cells is None else prefix_cells // page_size
    prefixes = PrefixCache(space, shared=True, max_pages=max_pages)
    return KVLayout(space=space, prefixes=prefixes, num_cells=space.num_cells)


def contiguous_layout(
    num_cells: int, *, window: int, most_used: int, prefix_cells: int | None
) -> KVLayout:
    """Regions for sequences, and behind them cells set aside for prefixes.

    The latter are `prefix_cells`; if that is None a quarter of all. Where all cells hold
    a sequence of `window` tokens, the longest that the model takes, it is no cell that such
    a one would lack; where they do not, sequences must be shorter anyway.
    """
    if prefix_cells is None:
        prefix_cells = int(num_cells * _PREFIX_SHARE)
        if num_cells >= window:
            prefix_cells = min(prefix_cells, num_cells - window)
    num_blocks = prefix_cells // BLOCK_SIZE
    space = ContiguousSpace(min(num_cells - num_blocks * BLOCK_SIZE, most_used))
    aside = PagedSpace(num_blocks, BLOCK_SIZE, first_cell=space.num_cells)
    prefixes = PrefixCache(aside, shared=False)
    cells = range(space.num_cells, space.num_cells + aside.num_cells)
    return KVLayout(space=space, prefixes=prefixes, num_cells=cells.stop, aside=cells)
