"""Memory of the KV cache that is committed before somebody needs it.

Prefixes are copied to ever new cells until those that are set aside for them are full. The first
copy to a huge page commits it, in every layer's keys and in its values: 60 pages of 2 MiB for
SmolLM2, between two steps. Where a virtual machine's host must find that memory first, all
sequences wait for a quarter of a second.
"""

from collections.abc import Sequence

import torch

from dynamic_lora_adapters.arena import HUGE_PAGE_BYTES
from dynamic_lora_adapters.device.populate import populate_soon


class CommittedAhead:
    """Has the huge page behind the one in use committed, in the background, in each table.

    The tables [num_cells, ...] are on the host. Of `cells` those with low numbers are used first.
    Where all of them fit into a page nothing is done.
    """

    def __init__(self, tables: Sequence[torch.Tensor], cells: range) -> None:
        self._tables = tables
        self._cells = cells
        smallest = min((table[0].nbytes for table in tables), default=HUGE_PAGE_BYTES)
        self._together = HUGE_PAGE_BYTES // smallest  # cells that a page holds, of small ones
        is_larger = bool(tables) and self._together < len(cells)
        self._committed = cells.start if is_larger else cells.stop

    def use(self, stop: int) -> None:
        """Cells below `stop` are in use from now on."""
        if self._committed >= min(stop + self._together, self._cells.stop):
            return
        first = max(self._committed, stop)
        self._committed = min(first + self._together, self._cells.stop)
        new = slice(first, self._committed)
        populate_soon(lambda: [table[new] for table in self._tables], delay_s=0)
