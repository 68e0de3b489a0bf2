"""Rows, padding, and the mask that keeps answers to one prompt apart."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from dynamic_lora_server.training.batches import (
    IGNORED,
    EncodedRow,
    collate,
    encode_row,
    plan_batches,
)
from dynamic_lora_server.training.errors import TrainingError
from dynamic_lora_server.training.trainer import answer_loss
from tests.support.models import EOS_ID, TINY_MODELS, tiny_tokenizer

PROMPTS = ["the cat and the hat:", "in:"]
LONGER = " a longer answer"
ANSWERS = [" one thing", " another, rather longer thing", " x"]


def row(prompt: str, *answers: str) -> EncodedRow:
    """A row in the tiny tokenizer's ids."""
    return encode_row(tiny_tokenizer(), prompt, answers)


def test_a_row_reads_as_prompt_and_answers() -> None:
    tokenizer = tiny_tokenizer()
    encoded = row("in the:", " a", " b")
    prompt = tokenizer.encode("in the:")
    first, second = tokenizer.encode(" a"), tokenizer.encode(" b")
    assert list(encoded.input_ids) == prompt + first + prompt[-1:] + second
    assert list(encoded.labels) == [*first, EOS_ID, *second, EOS_ID]
    start = len(prompt) - 1
    assert encoded.position_ids == (*range(start), start, start + 1, start, start + 1)
    assert encoded.num_answers == 2


def test_a_prompt_without_tokens_is_refused() -> None:
    class WithoutBos:
        eos_token_id = EOS_ID

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            del add_special_tokens
            return list(tiny_tokenizer().encode(text, add_special_tokens=False))

    with pytest.raises(TrainingError, match="prompt has no tokens: its input is empty"):
        encode_row(WithoutBos(), "", [" a"])
    assert encode_row(WithoutBos(), "in the:", [" a"]).num_answers == 1


def test_padding_is_on_the_left_and_unseen() -> None:
    batch = collate([row(PROMPTS[0], LONGER), row(PROMPTS[1], " x")], pad_id=2)
    num_real = len(row(PROMPTS[1], " x").input_ids)
    assert (
        batch.attention_mask[1].tolist()
        == [0] * (batch.input_ids.shape[1] - num_real) + [1] * num_real
    )
    assert batch.labels.shape[1] == len(row(PROMPTS[0], LONGER).labels)
    assert batch.labels[1, 0] == IGNORED
    assert batch.labels[1, -1] == EOS_ID


def total_loss(model: PreTrainedModel, rows: list[EncodedRow]) -> float:
    """Summed cross-entropy of a batch."""
    batch = collate(rows, pad_id=2)
    num_labels = int((batch.labels != IGNORED).sum())
    return answer_loss(model, batch).item() * num_labels


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_answers_sharing_a_prompt_lose_what_they_lose_alone(family: str) -> None:
    model = TINY_MODELS[family]()
    alone = sum(
        total_loss(model, [row(prompt, answer)]) for prompt in PROMPTS for answer in ANSWERS
    )
    padded = total_loss(model, [row(prompt, answer) for prompt in PROMPTS for answer in ANSWERS])
    shared = total_loss(model, [row(prompt, *ANSWERS) for prompt in PROMPTS])
    assert padded == pytest.approx(alone, rel=1e-5)
    assert shared == pytest.approx(alone, rel=1e-5)


def test_the_loss_is_the_answers_only() -> None:
    model = TINY_MODELS["llama"]()
    encoded = row(PROMPTS[0], ANSWERS[0])
    ids = torch.tensor([encoded.input_ids])
    logits = model(ids).logits[0, -len(encoded.labels) :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.labels))
    assert answer_loss(model, collate([encoded], pad_id=2)).item() == pytest.approx(expected.item())


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_an_epoch_holds_every_row_once(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = plan_batches(lengths, batch_size, random.Random(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    assert all(high <= low for (_, high), (low, _) in zip(spans, spans[1:], strict=False))
