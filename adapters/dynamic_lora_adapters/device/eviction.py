"""Who leaves the device for an adapter that has no room there."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.slab_layout import SlabKind


@dataclass(frozen=True, slots=True)
class Wanted:
    """Room for one more adapter of a kind.

    `free_bytes` of the budget are left beside what it takes besides a slot, fewer than 0 if that
    alone is too much; `has_slot` says whether a slot is free for it.
    """

    kind: SlabKind
    free_bytes: int
    has_slot: bool

    def victims(self, idle: Sequence[ResidentAdapter]) -> list[ResidentAdapter]:
        """Of idle adapters, least recently used first, those to evict; empty if that is no use.

        As long a beginning of `idle` as it takes, without those of it whom that does not need: a
        slab gives its memory back only when all of its adapters have gone.
        """
        if not self._found_without(idle):
            return []
        lengths = range(1, len(idle) + 1)
        needed = bisect_left(lengths, True, key=lambda n: self._found_without(idle[:n])) + 1
        victims = self._of_use(idle[:needed])
        for adapter in victims[-2::-1]:
            fewer = [one for one in victims if one is not adapter]
            if self._found_without(fewer):
                victims = fewer
        return victims

    def _of_use(self, victims: Sequence[ResidentAdapter]) -> list[ResidentAdapter]:
        """Those that alone, or with all others of their slab, leave any room.

        Of thousands that were used long ago most have neighbours that were not.
        """
        gone = Counter(one.slab.number for one in victims)

        def leaves_room(one: ResidentAdapter) -> bool:
            slab = one.slab
            whole = slab.num_taken == gone[slab.number]
            return whole or one.own_bytes > 0 or self.kind.includes(slab)

        return list(filter(leaves_room, victims))

    def _found_without(self, victims: Sequence[ResidentAdapter]) -> bool:
        free, has_slot = self.free_bytes, self.has_slot
        free += sum(one.own_bytes for one in victims)
        gone = Counter(one.slab.number for one in victims)
        for slab in {one.slab.number: one.slab for one in victims}.values():
            if slab.num_taken == gone[slab.number]:
                free += slab.num_bytes
            else:
                has_slot |= self.kind.includes(slab)
        return free >= 0 and (has_slot or self.kind.num_slots_for(free) >= 1)
