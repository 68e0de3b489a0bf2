"""Empty slots at the ends of slabs: room for others, before anybody leaves for it.

A slab has room for adapters that may never come. On the host its memory is not committed
before it is written, and can be given back.
"""

from collections.abc import Sequence

from dynamic_lora_adapters.device.populate import release
from dynamic_lora_adapters.device.slab import Slab


def cut_slack(slabs: Sequence[Slab], num_bytes: int, kept: tuple[Slab, int] | None) -> bool:
    """Cut the ends of slabs on the host until they have given up `num_bytes`, the longest first.

    `kept` is a slot that stays. False, and nothing is cut, where all ends together are shorter.
    """

    def end(slab: Slab) -> int:
        return max(slab.num_reached, kept[1] + 1 if kept and kept[0] is slab else 0)

    def slack(slab: Slab) -> int:
        return slab.num_bytes - slab.slot_bytes * end(slab)

    if not 0 < num_bytes <= sum(map(slack, slabs)):
        return False
    for slab in sorted(slabs, key=slack, reverse=True):
        if num_bytes > 0:
            num_bytes -= slack(slab)
            _cut(slab, end(slab))
    return True


def _cut(slab: Slab, num_slots: int) -> None:
    for slot in range(num_slots, len(slab.tenants)):
        release([one for place in slab.places(slot) for one in place.tensors()])
    slab.cut(num_slots)
