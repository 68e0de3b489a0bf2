"""Scores as a slow loop over rows and tokens changes them."""

import math
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_server.engine.sampling.adjustments import ScoredRow, adjusted
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import (
    MAX_BIASES,
    GenerationSpec,
    Grammar,
    GrammarKind,
    SamplingParams,
)
from tests.support.engines import make_sequence

VOCAB = 12
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@st.composite
def params(draw: st.DrawFn) -> dict[str, Any]:
    """What a request may ask for; half of the fields are left out."""
    asked: dict[str, st.SearchStrategy[Any]] = {
        "repetition_penalty": st.sampled_from([0.5, 1.3, 5.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.25, 1.0]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 0.5, 100.0]), max_size=4
        ).map(lambda biases: tuple(biases.items())),
        "min_new_tokens": st.integers(0, 8),
        "stop_token_ids": IDS.map(tuple),
        "ignore_eos": st.booleans(),
    }
    return {name: draw(value) for name, value in asked.items() if draw(st.booleans())}


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[ScoredRow, int | None]]:
    """A sequence's rows with drafted tokens before them, or one with a token not read yet."""
    sequence = make_sequence(draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)))
    sequence.sampling = SamplingParams(**{"max_new_tokens": 20} | draw(params()))
    sequence.output_ids = draw(IDS)
    if draw(st.booleans()):
        sequence.num_unread = 1
        return [(ScoredRow(sequence), draw(st.integers(0, VOCAB - 1)))]
    draft = draw(IDS)
    return [(ScoredRow(sequence, tuple(draft[:n])), None) for n in range(len(draft) + 1)]


def slowly(scores: torch.Tensor, row: ScoredRow, unread: int | None) -> torch.Tensor:
    """The reference: one row [vocab], token by token."""
    sampling, scores = row.sequence.sampling, scores.clone()
    output = [*row.sequence.output_ids, *row.ahead, *([] if unread is None else [unread])]
    for token_id in {*row.sequence.prompt_ids, *output}:
        penalty = sampling.repetition_penalty
        scores[token_id] *= penalty if scores[token_id] < 0 else 1 / penalty
    for token_id in set(output):
        scores[token_id] -= sampling.presence_penalty
        scores[token_id] -= sampling.frequency_penalty * output.count(token_id)
    for token_id, bias in sampling.logit_bias:
        scores[token_id] += bias
    if len(output) < sampling.min_new_tokens:
        scores[list(sampling.stop_token_ids)] = -math.inf
        if not sampling.ignore_eos:
            scores[list(row.sequence.stop_ids)] = -math.inf
    return scores


@given(groups=st.lists(rows(), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(deadline=None)
def test_every_row_is_what_the_slow_loop_makes_of_it(
    groups: Seq[list[tuple[ScoredRow, int | None]]], seed: int
) -> None:
    pairs = [pair for group in groups for pair in group]
    logits = torch.randn(len(pairs), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    unread = UnreadTokens(
        torch.tensor([0 if token is None else token for _, token in pairs]),
        {row.sequence.id: place for place, (row, _) in enumerate(pairs)},
    )
    before = logits.clone()
    scores = adjusted(logits, [row for row, _ in pairs], unread)
    expected = torch.stack([slowly(logits[n], *pair) for n, pair in enumerate(pairs)])
    torch.testing.assert_close(scores, expected)
    assert torch.equal(logits, before)


def test_nothing_is_copied_where_nothing_is_asked_for() -> None:
    logits = torch.zeros(2, VOCAB)
    assert adjusted(logits, [ScoredRow(make_sequence([1])) for _ in range(2)]) is logits


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_new_tokens": -1}, "min_new_tokens must not be negative"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "at least 5 tokens, and at most 4"),
        ({"logit_bias": ((1, 101.0),)}, "between -100 and 100 for each"),
        ({"logit_bias": ((1, math.nan),)}, "between -100 and 100 for each"),
        ({"logit_bias": ((1, 0.0),) * (MAX_BIASES + 1)}, "more than 1024 tokens"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        SamplingParams(**wrong)


def test_a_grammar_knows_by_itself_where_it_may_end() -> None:
    with pytest.raises(InvalidParameter, match="where a grammar ends, nothing may follow"):
        GenerationSpec(
            prompt="x",
            sampling=SamplingParams(min_new_tokens=3),
            grammar=Grammar(GrammarKind.REGEX, "a", "f"),
        )
