"""Random traffic for tiny engines: what is asked for and when, and what came of it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from dynamic_lora_server.engine.engine import TokenEvent
from dynamic_lora_server.engine.sequence import Phase, Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from tests.support.engines import admit, make_sequence, random_prompt
from tests.support.grammars import guide, regex
from tests.support.models import VOCAB_SIZE

TASKS = [None, "all", "attention"]
# One in five, so that some sequences end early.
STOPS = tuple(range(VOCAB_SIZE))[::5]
GRAMMARS = ["(a|b|the)*", '[{]"the king": "[a-z]*"}']


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """What one request asks for, and the step at which it comes."""
    params: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(1, 8)),
        "stop_token_ids": draw(st.sampled_from([(), STOPS])),
        "logprobs": draw(st.booleans()),
        "top_logprobs": draw(st.integers(0, 3)),
    }
    if draw(st.booleans()):
        params |= {
            "temperature": draw(st.sampled_from([0.7, 3.0])),
            "seed": draw(st.integers(0, 9)),
        }
    if draw(st.sampled_from([False, False, True])):
        params |= {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    grammar = draw(st.sampled_from([None, None, *GRAMMARS]))
    return {
        "grammar": grammar,
        "at": draw(st.integers(0, 6)),
        "task": draw(st.sampled_from(TASKS)),
        "shared": draw(st.booleans()),
        "length": draw(st.integers(1, 70)),
        "params": params,
    }


def serve(
    built: BuiltEngine, wanted: list[dict[str, Any]], folders: dict[str, Path]
) -> list[list[TokenEvent]]:
    """Every request's events; requests come at their steps."""
    sequences: list[Sequence] = []
    for number, one in enumerate(wanted):
        # Half of the prompts begin alike, so that prefixes are found.
        seed = 0 if one["shared"] else number + 1
        adapter = None if one["task"] is None else admit(built, folders[one["task"]])
        prompt = random_prompt(70, seed=seed)[: one["length"]]
        sequence = make_sequence(prompt, adapter=adapter, **one["params"])
        if one["grammar"] is not None:
            sequence.guide = guide(regex(one["grammar"]), stops=sequence.sampling.stop_token_ids)
        sequences.append(sequence)
    found: dict[int, list[TokenEvent]] = {one.id: [] for one in sequences}
    step = 0
    while step <= 6 or built.engine.has_work:
        for one, sequence in zip(wanted, sequences, strict=True):
            if one["at"] == step:
                built.engine.add(sequence)
        for event in built.engine.step():
            assert isinstance(event, TokenEvent), event
            found[event.sequence_id].append(event)
        step += 1
    built.engine.scheduler.check_integrity()
    for sequence in sequences:
        assert [e.sampled.token_id for e in found[sequence.id]] == sequence.output_ids
        assert (sequence.num_unread, sequence.phase) == (0, Phase.ENDED) or sequence.num_unread == 1
        if sequence.adapter is not None:
            built.pool.release(sequence.adapter)
    return [found[one.id] for one in sequences]


def assert_same(found: list[list[TokenEvent]], wished: list[list[TokenEvent]]) -> None:
    """Two engines gave the same tokens, ends and log-probabilities to the same traffic."""
    for expected, actual in zip(wished, found, strict=True):
        assert [(e.sampled.token_id, e.reason) for e in actual] == [
            (e.sampled.token_id, e.reason) for e in expected
        ]
        for one, other in zip(actual, expected, strict=True):
            assert one.sampled.logprob == pytest.approx(other.sampled.logprob, abs=1e-4)
            # By rank: two tokens as likely as each other may change places.
            assert [logprob for _, logprob in one.sampled.top] == pytest.approx(
                [logprob for _, logprob in other.sampled.top], abs=1e-4
            )
            likely = dict(other.sampled.top)
            for token_id, logprob in one.sampled.top:
                assert likely.get(token_id, logprob) == pytest.approx(logprob, abs=1e-4)
