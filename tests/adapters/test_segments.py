import torch

from dynamic_lora_adapters.segments import DeltaPlan, Run, slot_order
from tests.support.slabs import make_slab, resident


def test_neighbouring_slots_form_one_run() -> None:
    slab = make_slab(4, 8, 4, 4)
    first, second = resident(slab, 1), resident(slab, 2)
    plan = DeltaPlan.of([(None, 3), (first, 2), (first, 1), (second, 4)])
    (run,) = plan.runs
    assert (run.slot_start, run.row_start, run.lengths) == (1, 3, [3, 4])
    assert (run.rows, run.slots) == (slice(3, 10), slice(1, 3))


def test_gaps_slabs_and_base_rows_split_runs() -> None:
    slab, other = make_slab(4, 8, 4, 4), make_slab(4, 8, 4, 4, number=1)
    rows = [
        (resident(slab, 0), 1),
        (resident(slab, 2), 1),
        (None, 5),
        (resident(slab, 3), 1),
        (resident(other, 0), 2),
    ]
    runs = DeltaPlan.of(rows).runs
    assert [(r.slab.number, r.slot_start, r.row_start, r.lengths) for r in runs] == [
        (0, 0, 0, [1]),
        (0, 2, 1, [1]),
        (0, 3, 7, [1]),
        (1, 0, 8, [2]),
    ]


def test_a_batch_of_base_rows_has_no_runs() -> None:
    assert DeltaPlan.of([(None, 7)]).runs == ()


def test_slot_order_sorts_base_rows_first_then_slabs_then_slots() -> None:
    old, new = make_slab(2, 8, 4, 4), make_slab(2, 8, 4, 4, number=1)
    a, b, c = resident(new, 0), resident(old, 1), resident(old, 0)
    assert sorted([a, b, None, c], key=slot_order) == [None, c, b, a]


def test_padding_maps_rows_to_cells_and_back() -> None:
    run = Run(make_slab(3, 8, 4, 4), 0, 0, [2, 1, 3])
    gather, scatter = run.padding(torch.device("cpu"))
    assert gather.tolist() == [0, 1, 0, 2, 2, 2, 3, 4, 5]
    assert scatter.tolist() == [0, 1, 3, 6, 7, 8]
    rows = torch.arange(6)
    assert rows[gather][scatter].tolist() == rows.tolist()


def test_owner_names_the_segment_of_each_row() -> None:
    run = Run(make_slab(3, 8, 4, 4), 0, 0, [2, 1, 3])
    assert run.owner(torch.device("cpu")).tolist() == [0, 0, 1, 2, 2, 2]
