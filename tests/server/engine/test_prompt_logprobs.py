"""Log-probabilities of prompts are PEFT's, in any batch and however the prompts are cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from dynamic_lora_server.engine.engine import FailedEvent, PromptEvent, TokenEvent
from dynamic_lora_server.engine.sampling.sampler import Sampled
from dynamic_lora_server.engine.scheduler import _MAX_SCORED
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.engines import TASKS, admit, make_engine, make_sequence, random_prompt
from tests.support.models import tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "native": {"mode": Mode.BYPASS},
    "torch": {"mode": Mode.BYPASS, "native": False},
    "paged": {"mode": Mode.BYPASS, "paged": True},
    "merged": {"mode": Mode.MERGED},
    "overlapping": {"mode": Mode.BYPASS, "overlap": True},
    "small pieces": {"mode": Mode.BYPASS, "prefill_chunk": 7},
}


def scored(prompt: list[int], **params: Any) -> Sequence:
    asked = {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": True, "max_new_tokens": 3}
    return make_sequence(prompt, **asked | params)


def told(built: BuiltEngine, sequences: list[Sequence]) -> dict[int, list[Sampled]]:
    """What is told of each prompt, by sequence id; the answers come after it."""
    found: dict[int, list[Sampled]] = {one.id: [] for one in sequences}
    answers: dict[int, int] = {one.id: 0 for one in sequences}
    for one in sequences:
        built.engine.add(one)
    while built.engine.has_work:
        for event in built.engine.step():
            assert not isinstance(event, FailedEvent), event
            if isinstance(event, PromptEvent):
                assert not answers[event.sequence_id]
                found[event.sequence_id] += event.tokens
            else:
                assert isinstance(event, TokenEvent)
                answers[event.sequence_id] += 1
    built.engine.scheduler.check_integrity()
    assert all(answers[one.id] == one.sampling.max_new_tokens for one in sequences)
    return found


def by_peft(oracle: PeftModel, task: str | None, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities [num_prompt - 1, vocab] of what comes after each token."""
    ids = torch.tensor([prompt])
    if task is None:
        with oracle.disable_adapter():
            logits: torch.Tensor = oracle(input_ids=ids).logits
    else:
        oracle.set_adapter(task.replace(" ", "_"))
        logits = oracle(input_ids=ids).logits
    return logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_they_are_those_of_peft(kind: str, oracle: PeftModel, folders: dict[str, Path]) -> None:
    built = make_engine(tiny_llama(), **KINDS[kind])
    prompts = [random_prompt(2 + 9 * i, seed=i) for i in range(len(TASKS))]
    sequences = [
        scored(prompt, adapter=None if task is None else admit(built, folders[task]))
        for task, prompt in zip(TASKS, prompts, strict=True)
    ]
    others = [make_sequence(random_prompt(30, seed=9)), make_sequence([5, 6], temperature=1.0)]
    found = told(built, [*sequences, *others])
    assert not any(found[one.id] for one in others)
    for task, prompt, sequence in zip(TASKS, prompts, sequences, strict=True):
        expected = by_peft(oracle, task, prompt)
        tokens = found[sequence.id]
        assert [one.token_id for one in tokens] == prompt[1:], task
        for row, one in zip(expected, tokens, strict=True):
            assert one.logprob == pytest.approx(float(row[one.token_id]), abs=2e-4)
            best = row.topk(2)
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"repetition_penalty": 3.0}, {}])
def test_how_the_answer_is_chosen_changes_nothing(params: dict[str, Any]) -> None:
    built = make_engine(tiny_llama())
    prompt = random_prompt(20, seed=1)
    plain, other = scored(prompt), scored(prompt, **params)
    found = told(built, [plain, other])
    for one, two in zip(found[plain.id], found[other.id], strict=True):
        assert one.token_id == two.token_id
        assert one.logprob == pytest.approx(two.logprob, abs=1e-5)


def test_a_known_prompt_is_computed_again_and_a_long_one_in_pieces() -> None:
    built = make_engine(tiny_llama())
    prompt = random_prompt(2 * _MAX_SCORED + 40, seed=1)
    told(built, [make_sequence(prompt, max_new_tokens=1)])
    sequences = [scored(prompt, max_new_tokens=1), scored(prompt, max_new_tokens=1)]
    before = built.engine.num_steps
    found = told(built, sequences)
    assert built.engine.num_steps - before >= 2 * len(prompt) // _MAX_SCORED
    for one in sequences:
        assert one.num_reused == 0
        assert [token.token_id for token in found[one.id]] == prompt[1:]


def test_of_one_token_nothing_is_told() -> None:
    built = make_engine(tiny_llama())
    sequence = scored([5])
    assert told(built, [sequence]) == {sequence.id: []}
