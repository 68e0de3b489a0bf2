import torch

from dynamic_lora_server.engine.batch import Batch
from dynamic_lora_server.engine.kv.space import ContiguousSpace, PagedSpace
from dynamic_lora_server.engine.scheduler import Scheduler
from tests.support.engines import advance, make_sequence
from tests.support.slabs import make_slab, resident

CPU = torch.device("cpu")


def test_rows_are_sorted_by_slot_base_rows_first() -> None:
    slab = make_slab(3, 8, 4, 4)
    first, second = resident(slab, 0), resident(slab, 1)
    scheduler = Scheduler(ContiguousSpace(200), max_running=8, prefill_chunk=64)
    decoding = [make_sequence([5], adapter=adapter) for adapter in (second, None, first)]
    for sequence in decoding:
        scheduler.add(sequence)
    for piece in scheduler.schedule():
        advance(scheduler, piece, 7)
    prompt = make_sequence([11, 12, 13], adapter=first)
    scheduler.add(prompt)
    batch = Batch.build(scheduler.schedule(), CPU)
    second_, base, first_ = decoding
    assert [p.sequence for p in batch.pieces] == [base, first_, prompt, second_]
    assert batch.input_ids.tolist() == [[7, 7, 11, 12, 13, 7]]
    assert batch.position_ids.tolist() == [[1, 1, 0, 1, 2, 1]]
    assert batch.logit_rows.tolist() == [0, 1, 4, 5]
    assert [(run.slot_start, run.row_start, run.lengths) for run in batch.plan.runs] == [
        (0, 1, [4, 1]),
    ]


def test_pieces_of_a_prompt_name_their_cells_and_what_is_cached() -> None:
    scheduler = Scheduler(PagedSpace(4, 4), max_running=1, prefill_chunk=5)
    sequence = make_sequence([10, 11, 12, 13, 14, 15, 16], max_new_tokens=2)
    scheduler.add(sequence)
    (piece,) = scheduler.schedule()
    first = Batch.build([piece], CPU)
    assert first.scored == []
    assert first.logit_rows.tolist() == []
    advance(scheduler, piece)
    second = Batch.build(scheduler.schedule(), CPU)
    assert second.input_ids.tolist() == [[15, 16]]
    assert second.position_ids.tolist() == [[5, 6]]
    assert sequence.allocation is not None
    assert second.cells.tolist() == sequence.allocation.cells(5, 7)
    (span,) = second.spans
    assert (span.num_cached, span.num_new, span.num_total) == (5, 2, 7)
