"""Drafted tokens make steps fewer and change nothing else."""

import random
import re
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from dynamic_lora_server.engine.attention.packed import FEW_TOKENS
from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT, Draft, Drafter
from dynamic_lora_server.engine.engine import Engine, TokenEvent
from dynamic_lora_server.engine.kv.space import ContiguousSpace
from dynamic_lora_server.engine.scheduler import Piece, Scheduler
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import FinishReason
from dynamic_lora_server.modes import Mode, StepCosts
from tests.support.engines import (
    NUM_TOKENS,
    TASKS,
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    run_all,
)
from tests.support.grammars import VIEW, guide, guided, regex
from tests.support.models import VOCAB_SIZE, tiny_llama
from tests.support.traffic import assert_same, requests, serve


def costs(*points: tuple[int, float]) -> StepCosts:
    return StepCosts(base=points, deltas=((1, ((1, 0.0),)),), switch_s=1.0)


FREE = costs((1, 1.0), (1000, 1.0))  # a step takes as long whatever is in it
BY_ROW = costs((1, 1.0), (1000, 1000.0))  # a row takes as long whatever is beside it


class Guesser(Drafter):
    """Drafts whatever comes to its mind."""

    def draft(self, decoding: Seq[Sequence], room: int) -> dict[int, Draft]:
        rng = random.Random(len(decoding) + room)
        drafts = {}
        for sequence in decoding:
            known = super().draft([sequence], room).get(sequence.id, ())
            left = sequence.sampling.max_new_tokens - sequence.num_output - 1
            tokens = [*known, *rng.choices(range(3, VOCAB_SIZE), k=MAX_DRAFT)]
            drafts[sequence.id] = tuple(tokens[: min(left, MAX_DRAFT, room)])
            room -= len(drafts[sequence.id])
        return drafts


def drafting(drafter: Drafter | None = None, **options: Any) -> BuiltEngine:
    """An engine that drafts whatever may come true, or by a drafter of one's own."""
    built = make_engine(tiny_llama(), speculate=MAX_DRAFT, **options)
    assert built.engine.scheduler.drafter is not None
    built.engine.scheduler.drafter = drafter or Drafter(FREE, MAX_DRAFT)
    return built


def steps_of(built: BuiltEngine, *sequences: Sequence) -> int:
    before = built.engine.num_steps
    run_all(built, sequences)
    return built.engine.num_steps - before


KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {"mode": Mode.BYPASS},
    "paged": {"mode": Mode.BYPASS, "paged": True},
    "torch": {"mode": Mode.BYPASS, "native": False},
    "merged": {"mode": Mode.MERGED},
}


@pytest.fixture(scope="module", params=KINDS)
def engines(request: pytest.FixtureRequest) -> list[BuiltEngine]:
    """Without drafts, with good ones, and with bad ones."""
    kind = KINDS[request.param]
    plain = make_engine(tiny_llama(), **kind)
    return [plain, drafting(**kind), drafting(Guesser(FREE, MAX_DRAFT), **kind)]


@given(wanted=st.lists(requests(), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_gets_the_same(
    engines: list[BuiltEngine], folders: dict[str, Path], wanted: list[dict[str, Any]]
) -> None:
    """Drawn tokens, too: a draw depends on its place in the answer, not on the step."""
    plain, *drafted = (serve(built, wanted, folders) for built in engines)
    for found in drafted:
        assert_same(found, plain)
    for built in engines[1:]:
        stats = built.engine.scheduler.draft_stats()
        assert 0 <= stats.num_accepted <= stats.num_drafted


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_peft(
    kind: str, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    built = drafting(Guesser(FREE, MAX_DRAFT), **KINDS[kind])
    prompts = [random_prompt(3 + 9 * i, seed=i) for i in range(len(TASKS))]
    for _ in range(2):  # the second time most is known
        sequences = [
            make_sequence(prompt, adapter=None if task is None else admit(built, folders[task]))
            for task, prompt in zip(TASKS, prompts, strict=True)
        ]
        for task, prompt, found in zip(TASKS, prompts, run_all(built, sequences), strict=True):
            assert found == expected_tokens(oracle, task, prompt), task
    stats = built.engine.scheduler.draft_stats()
    assert stats.num_drafted > stats.num_accepted > NUM_TOKENS


def test_what_was_said_before_takes_fewer_steps(folders: dict[str, Path]) -> None:
    built = drafting()
    adapter = admit(built, folders["all"])

    def again(**params: Any) -> Sequence:
        return make_sequence(random_prompt(20, seed=3), adapter=adapter, **params)

    assert steps_of(built, again(max_new_tokens=33)) > 8
    # The prompt's step and four of eight tokens, had every guess come true.
    assert steps_of(built, again(max_new_tokens=33)) < 8
    assert steps_of(built, again(max_new_tokens=33, temperature=1e-4, seed=1)) < 8
    assert steps_of(built, again(max_new_tokens=33, top_logprobs=2)) < 8
    assert steps_of(built, again(max_new_tokens=33, presence_penalty=1e-4)) < 8


def test_what_a_grammar_forces_takes_fewer_steps() -> None:
    built = drafting()
    text = regex('[{]"the king of the hill": "(on|a)"}')
    first, again = (guided(random_prompt(20, seed=seed), text) for seed in (3, 4))
    plain = guided(random_prompt(20, seed=4), text)
    run_all(make_engine(tiny_llama()), [plain])
    steps_of(built, first)
    # Nothing that was said before tells the next token of an answer that has just begun.
    assert steps_of(built, again) < len(plain.output_ids) / 3
    assert again.output_ids == plain.output_ids


def test_no_draft_leaves_the_grammar() -> None:
    drafter = Drafter(FREE, MAX_DRAFT)
    heard(drafter)
    free = decoding(drafter)
    assert drafter.draft([free], 100) == {free.id: (12, 13, 14, 15, 16, 17, 18)}
    (ten, eleven, twelve) = (re.escape(VIEW.bytes_of(one).decode()) for one in (10, 11, 12))
    held = make_sequence([5], max_new_tokens=30)
    held.guide = guide(regex(f"{ten}{eleven}{twelve}(xyz)?"))
    drafter.draft([held], 0)
    for token_id in (10, 11):
        held.take(token_id)
    drafter.hear(held, [10, 11], 0)
    assert drafter.draft([held], 100) == {held.id: (12,)}


def test_a_token_that_ends_the_answer_is_not_drafted() -> None:
    drafter = Drafter(FREE, MAX_DRAFT)
    heard(drafter)
    ended = decoding(drafter, stop_token_ids=(14,))
    assert drafter.draft([ended], 100) == {ended.id: (12, 13)}


def test_another_adapter_knows_nothing_of_it(folders: dict[str, Path]) -> None:
    built = drafting()
    first = make_sequence(random_prompt(20, seed=3), adapter=admit(built, folders["all"]))
    other = make_sequence(random_prompt(20, seed=3), adapter=admit(built, folders["attention"]))
    run_all(built, [first])
    alone = drafting()
    same = make_sequence(random_prompt(20, seed=3), adapter=admit(alone, folders["attention"]))
    assert steps_of(built, other) == steps_of(alone, same)


def test_several_tokens_of_a_step_come_as_so_many_events() -> None:
    built = drafting()
    for _ in range(9):  # until it trusts its guesses
        run_all(built, [make_sequence(random_prompt(9, seed=1))])
    sequence = make_sequence(random_prompt(9, seed=1))
    built.engine.add(sequence)
    built.engine.step()
    events = built.engine.step()
    assert [type(event) for event in events] == [TokenEvent] * 8
    assert [e.sampled.token_id for e in events if isinstance(e, TokenEvent)] == (
        sequence.output_ids[1:]
    )
    (last,) = built.engine.step()
    assert isinstance(last, TokenEvent)
    assert last.reason is FinishReason.LENGTH


def test_a_stop_within_a_draft_ends_the_answer_there() -> None:
    built = drafting()
    prompt = random_prompt(9, seed=1)
    (tokens,) = run_all(built, [make_sequence(prompt)])
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    sequence = make_sequence(prompt, stop_token_ids=(stop,))
    built.engine.add(sequence)
    events = built.engine.step() + built.engine.step()
    assert sequence.output_ids == tokens[: tokens.index(stop) + 1]
    assert [e.reason for e in events if isinstance(e, TokenEvent)][-1] is FinishReason.STOP
    assert not built.engine.has_work
    built.engine.scheduler.check_integrity()


def test_nothing_is_kept_of_sequences_that_have_ended() -> None:
    built = drafting()
    gone, done = (make_sequence(random_prompt(9, seed=seed)) for seed in range(2))
    built.engine.add(gone)
    built.engine.step()
    built.engine.cancel(gone)
    run_all(built, [done])
    drafter = built.engine.scheduler.drafter
    assert drafter is not None
    assert not drafter._texts


def heard(drafter: Drafter, number: int = 40) -> list[int]:
    """What the base model is made to say again and again after any prompt."""
    phrase = list(range(10, 30))
    for _ in range(number):
        sequence = make_sequence([5], max_new_tokens=30)
        drafter.draft([sequence], 0)  # what it expects is scored
        drafter.hear(sequence, phrase, 0)
    return phrase


def decoding(drafter: Drafter, **params: Any) -> Sequence:
    sequence = make_sequence([5], **{"max_new_tokens": 30} | params)
    drafter.draft([sequence], 0)
    sequence.output_ids += [10, 11]
    drafter.hear(sequence, [10, 11], 0)
    return sequence


def test_as_much_is_drafted_as_is_foreseen_and_may_come() -> None:
    drafter = Drafter(FREE, 5)
    heard(drafter)
    sequence = decoding(drafter)
    assert drafter.draft([sequence], 100) == {sequence.id: (12, 13, 14, 15, 16)}
    assert drafter.draft([sequence], 2) == {sequence.id: (12, 13)}
    assert drafter.draft([sequence], 0) == {}
    short = decoding(drafter, max_new_tokens=5)
    assert drafter.draft([short], 100) == {short.id: (12, 13)}
    last = decoding(drafter, max_new_tokens=3)
    assert drafter.draft([last], 100) == {}


def test_nothing_is_drafted_where_a_row_more_costs_what_a_token_is_worth() -> None:
    drafter = Drafter(BY_ROW, MAX_DRAFT)
    heard(drafter)
    assert drafter.draft([decoding(drafter)], 100) == {}


def test_a_step_is_filled_up_to_where_rows_begin_to_cost() -> None:
    drafter = Drafter(costs((1, 1.0), (6, 1.0), (7, 3.0), (8, 5.0)), MAX_DRAFT)
    heard(drafter)
    sequences = [decoding(drafter) for _ in range(2)]
    drafts = drafter.draft(sequences, 100)
    assert sum(map(len, drafts.values())) == 4


def test_the_surest_tokens_are_drafted_first() -> None:
    drafter = Drafter(costs((1, 1.0), (4, 1.0), (5, 9.0)), MAX_DRAFT)
    heard(drafter)
    sure = decoding(drafter)
    unsure = make_sequence([50, 51, 50])  # so far no guess of this kind has come true
    assert drafter.draft([unsure], 100) == {unsure.id: (51, 50)}
    drafts = drafter.draft([unsure, sure], 100)
    assert len(drafts[sure.id]) == 2
    assert unsure.id not in drafts


def test_one_sequence_does_not_slow_the_others_down_for_its_own_sake() -> None:
    drafter = Drafter(costs((1, 1.0), (8, 1.0), (15, 1.6)), MAX_DRAFT)
    heard(drafter)
    sure = decoding(drafter)
    unsure = [make_sequence([51 + number]) for number in range(7)]
    assert len(drafter.draft([sure], 100)[sure.id]) == 7
    # Fifteen tokens in 1.6 in place of eight in 1: more a second, and seven would have less.
    assert drafter.draft([sure, *unsure], 100) == {}
    # Where all are as sure, all gain.
    assert len(drafter.draft([decoding(drafter) for _ in range(8)], 100)) > 0


def test_rejected_tokens_leave_no_trace() -> None:
    scheduler = Scheduler(
        ContiguousSpace(100),
        max_running=2,
        prefill_chunk=16,
        drafter=Guesser(FREE, MAX_DRAFT),
    )
    sequence = make_sequence([4, 5, 6], max_new_tokens=9)
    scheduler.add(sequence)
    (piece,) = scheduler.schedule()
    scheduler.begin(piece)
    assert scheduler.settle(piece, [7]) == (1, None)
    (piece,) = scheduler.schedule()
    assert (piece.num_pending, len(piece.draft), piece.num_tokens) == (1, 7, 8)
    scheduler.begin(piece)
    assert scheduler.settle(piece, [*piece.draft[:2], 8]) == (3, None)
    assert sequence.output_ids == [7, *piece.draft[:2], 8]
    # All but the last token are in the cache: prompt, the first one, and two of the draft.
    assert (sequence.num_computed, sequence.num_pending, sequence.num_run) == (6, 1, 6)


def test_what_cannot_be_had_is_refused() -> None:
    assert MAX_DRAFT < FEW_TOKENS
    with pytest.raises(ValueError, match="speculate must lie between 0 and 7"):
        EngineOptions(speculate=8)
    with pytest.raises(ValueError, match="most must lie between 1 and 7, got 0"):
        Drafter(FREE, 0)
    with pytest.raises(InvalidParameter, match="speculate is for models on a CPU"):
        make_engine(torch.nn.Module.to(tiny_llama(), "meta"), speculate=1)
    built = drafting()
    with pytest.raises(ValueError, match="steps that overlap cannot draft"):
        Engine(built.engine.scheduler, built.engine.runner, built.modes, overlap=True)


def test_nothing_is_drafted_beside_a_prompt() -> None:
    built = drafting()
    first = make_sequence(random_prompt(9, seed=1), max_new_tokens=40)
    for _ in range(3):
        run_all(built, [make_sequence(random_prompt(9, seed=1), max_new_tokens=40)])
    built.engine.add(first)
    built.engine.step()
    built.engine.add(make_sequence(random_prompt(60, seed=2)))
    pieces = built.engine.scheduler.schedule()
    assert [(piece.num_pending, piece.draft) for piece in pieces][0] == (1, ())
    assert len(pieces) == 2


def test_a_piece_of_a_prompt_samples_nothing() -> None:
    sequence = make_sequence([1, 2, 3])
    assert Piece(sequence, 2).num_sampled == 0
    assert Piece(sequence, 3).num_sampled == 1


def test_steps_that_take_longer_than_measured_end_the_drafts() -> None:
    drafter = Drafter(costs(*((rows, 1.0) for rows in (1, 4, 8, 16, 32))), MAX_DRAFT)
    heard(drafter)
    sequences = [decoding(drafter) for _ in range(4)]
    assert sum(map(len, drafter.draft(sequences, 100).values())) == 28
    for _ in range(100):
        for num_rows in (4, 8, 16, 32):
            drafter.observe(num_rows, num_rows * 1.0)
    assert drafter.draft(sequences, 100) == {}


def test_only_steps_without_prompts_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    built = drafting()
    drafter = built.engine.scheduler.drafter
    monkeypatch.setattr(drafter, "observe", lambda num_rows, _: seen.append(num_rows))
    monkeypatch.setattr(drafter, "draft", lambda *_: {})
    first, late = make_sequence([5, 6], max_new_tokens=4), make_sequence([7], max_new_tokens=2)
    built.engine.add(first)
    built.engine.step()
    assert seen == []
    built.engine.step()
    built.engine.add(late)
    built.engine.step()
    built.engine.step()
    assert seen == [1, 2]
