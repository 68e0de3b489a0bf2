from collections.abc import Iterator

import pytest
import torch

from dynamic_lora_adapters.device.groups import GroupShape, ProjectionGroup
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.tables import MAX_RANK, AddressTables, TableDeltas
from tests.support.slabs import make_slab, resident

GROUPS = [ProjectionGroup(("q",), 8, (4,))]


def make_tables(num_entries: int) -> AddressTables:
    return AddressTables(GROUPS, num_entries, torch.device("cpu"))


def shaped(shape: GroupShape) -> ResidentAdapter:
    slab = make_slab(1, 8, 8, 4)
    slab.signature = (shape,)
    return resident(slab, 0)


def test_an_entry_holds_the_addresses_of_its_slot() -> None:
    slab = make_slab(3, 8, 8, 4)
    tables = make_tables(2)
    (entry,) = tables.entries([resident(slab, 2)])
    a, b = slab.a[0], slab.b[0]
    assert a is not None and b is not None
    assert int(tables.a[0, entry]) == a[2].data_ptr()
    assert int(tables.b[0, entry]) == b[2].data_ptr()


def test_entries_stay_until_others_need_them() -> None:
    slab = make_slab(4, 8, 8, 4)
    adapters = [resident(slab, slot) for slot in range(4)]
    tables = make_tables(3)
    first, second, third = tables.entries(adapters[:3])
    assert sorted((first, second, third)) == [0, 1, 2]
    assert tables.entries([adapters[2], adapters[0]]) == [third, first]
    # The second was used longest ago; those of this batch are not touched.
    assert tables.entries([adapters[3], adapters[0]]) == [second, first]
    assert tables.entries([adapters[2]]) == [third]


def test_slots_of_a_new_slab_have_entries_of_their_own() -> None:
    tables = make_tables(2)
    (old,) = tables.entries([resident(make_slab(1, 8, 8, 4, number=1), 0)])
    (new,) = tables.entries([resident(make_slab(1, 8, 8, 4, number=2), 0)])
    assert old != new


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (GroupShape(MAX_RANK), None),
        (GroupShape(MAX_RANK + 8), "large rank"),
        (GroupShape(8, scale=True), "terms that are no factors"),
        (GroupShape(8, bias=True), "terms that are no factors"),
    ],
)
def test_what_tables_cannot_hold_is_refused(shape: GroupShape, reason: str | None) -> None:
    assert make_tables(1).refusal(shaped(shape)) == reason


def test_the_shapes_of_a_slab_are_looked_through_once() -> None:
    tables = make_tables(1)
    slab = make_slab(2, 8, 8, 4, number=7)
    slab.signature = Counted((GroupShape(MAX_RANK + 8),))
    adapters = [resident(slab, 0), resident(slab, 1)]
    assert [tables.refusal(adapters[step % 2]) for step in range(6)] == ["large rank"] * 6
    assert slab.signature.num_walks == 1
    wider = make_slab(1, 8, 8, 4, number=8)
    assert tables.refusal(resident(wider, 0)) is None


class Counted(tuple[GroupShape, ...]):
    """Shapes that count how often they are gone through."""

    num_walks = 0

    def __iter__(self) -> Iterator[GroupShape]:
        self.num_walks += 1
        return super().__iter__()


def test_terms_on_the_output_head_are_refused_and_its_deltas_left_out() -> None:
    head = ProjectionGroup(("lm_head",), 8, (4,), is_head=True)
    tables = AddressTables([head], 1, torch.device("cpu"))
    assert tables.refusal(shaped(GroupShape(8))) == "terms on the output head"
    tiles = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    # Where there is no Triton either.
    out = torch.ones(1, 4)
    TableDeltas(tables, tiles, 1).add(0, out, torch.ones(1, 8))
    assert torch.equal(out, torch.ones(1, 4))


def test_a_merged_head_needs_its_own_weight() -> None:
    head = ProjectionGroup(("lm_head",), 8, (4,), is_head=True)
    tables = AddressTables([head], 1, torch.device("cpu"))
    assert tables.merged_refusal(shaped(GroupShape())) is None
    assert tables.merged_refusal(shaped(GroupShape(8))) == "a merged output head"
    assert make_tables(1).merged_refusal(shaped(GroupShape(8))) is None
    biased = make_tables(1).merged_refusal(shaped(GroupShape(8, bias=True)))
    assert biased == "terms that no weight holds"
