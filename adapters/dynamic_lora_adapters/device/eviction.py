"""Who leaves the device for an adapter that has no room there."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
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

    def victims(self, candidates: Sequence[ResidentAdapter]) -> list[ResidentAdapter]:
        """Of adapters, those that are to leave first in front, whom to evict; empty if that is no
        use.

        As long a beginning of `candidates` as it takes, without those of it whom that does not
        need: a slab gives its memory back only when all of its adapters have gone. In time and
        memory proportional to their number: requests wait for it.
        """
        room = _Room(self)
        num_needed = room.take_until_enough(candidates)
        if not num_needed:
            return []
        victims = [one for one in candidates[:num_needed] if room.is_needed(one)]
        kept: set[int] = set()
        for adapter in victims[-2::-1]:
            room.give_back(adapter)
            if room.enough:
                kept.add(id(adapter))
            else:
                room.take(adapter)
        return [one for one in victims if id(one) not in kept]


def order_of_claim(
    tenants: Iterable[ResidentAdapter],
    *,
    held: Collection[str],
    idle: Iterable[ResidentAdapter],
) -> list[ResidentAdapter]:
    """Adapters in the order in which somebody who waits for room lays claim to theirs.

    Those that leave anyway, then those whose digests are `held` already, so that a claim stays what
    it is; then those that are `idle`; of each the least recently used first.
    """
    may_go = set(map(id, idle))

    def rank(one: ResidentAdapter) -> tuple[bool, bool, bool, int]:
        return not one.doomed, one.digest not in held, id(one) not in may_go, one.last_used

    return sorted(tenants, key=rank)


class _Room:
    """What there is without some adapters: `take` and `give_back` say which."""

    def __init__(self, wanted: Wanted) -> None:
        self._kind = wanted.kind
        self._slab_bytes = wanted.kind.least_bytes
        self._has_slot = wanted.has_slot
        self._free = wanted.free_bytes
        self._num_gone: Counter[int] = Counter()  # by the slabs' numbers
        self._num_taken: dict[int, int] = {}
        self._fits: dict[int, bool] = {}
        self._num_opened = 0  # slabs of the kind that are left with a free slot

    @property
    def enough(self) -> bool:
        """Whether the wanted adapter has room."""
        has_slot = self._has_slot or self._num_opened > 0 or self._free >= self._slab_bytes
        return self._free >= 0 and has_slot

    def take_until_enough(self, candidates: Sequence[ResidentAdapter]) -> int:
        """Take adapters one after the other; how many it took, 0 if all are too few."""
        for number, adapter in enumerate(candidates, 1):
            self.take(adapter)
            if self.enough:
                return number
        return 0

    def is_needed(self, adapter: ResidentAdapter) -> bool:
        """Whether one that was taken leaves any room, alone or with all others of its slab.

        Of thousands that were used long ago most have neighbours that were not.
        """
        number = adapter.slab.number
        whole = self._num_gone[number] == self._num_taken[number]
        return whole or adapter.own_bytes > 0 or self._fits[number]

    def take(self, adapter: ResidentAdapter) -> None:
        """Count the adapter as gone."""
        self._change(adapter, 1)

    def give_back(self, adapter: ResidentAdapter) -> None:
        """Count one that was taken as there again."""
        self._change(adapter, -1)

    def _change(self, adapter: ResidentAdapter, by: int) -> None:
        slab = adapter.slab
        if slab.number not in self._num_taken:
            self._num_taken[slab.number] = slab.num_taken
            self._fits[slab.number] = self._kind.includes(slab)
        self._count(slab, -1)
        self._num_gone[slab.number] += by
        self._free += by * adapter.own_bytes
        self._count(slab, 1)

    def _count(self, slab: Slab, by: int) -> None:
        """Add what a slab leaves, or take it away again: all of its memory, or free slots."""
        num_gone = self._num_gone[slab.number]
        if num_gone == self._num_taken[slab.number]:
            self._free += by * slab.num_bytes
        elif num_gone and self._fits[slab.number]:
            self._num_opened += by
