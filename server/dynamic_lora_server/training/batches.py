"""Tokenised examples, and their grouping into padded batches of similar length."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from dynamic_lora_server.training.errors import TrainingError

IGNORED = -100


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that encoding needs."""

    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One prompt and one or more answers to it, as input columns.

        column     0 .. p-2        p-1 ..              ..
        input      prompt[:-1]     prompt[-1] answer0  prompt[-1] answer1
        branch     0               1                   2
        position   0 .. p-2        p-1 ..              p-1 ..

    Every answer opens with the prompt's last token again, so that each column predicts
    exactly one token; a branch sees the prompt and itself. `labels` are the tokens that
    the last `len(labels)` columns predict.
    """

    input_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    branches: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_answers(self) -> int:
        """How many answers the row holds."""
        return self.branches[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Left-padded rows, so that every row's answers end in the last column.

    `input_ids`, `position_ids`: int64 [rows, columns]. `attention_mask`: int64
    [rows, columns], or, where a row has several answers, float32 [rows, 1, columns,
    columns] to add to the scores. `labels`: int64 [rows, answer columns], the tokens
    that the last `labels.shape[1]` columns must predict, -100 where there is no loss.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        return type(self)(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )


def encode_row(tokenizer: Tokenizer, prompt: str, answers: Sequence[str]) -> EncodedRow:
    """Tokenise a prompt and its answers apart, each answer closed with EOS.

    Tokenising them together could merge tokens across the border, which never happens
    when the server continues a prompt. Raises TrainingError for a prompt without tokens.
    """
    prefix = tokenizer.encode(prompt)
    if not prefix:
        raise TrainingError(
            "an example's prompt has no tokens: its input is empty, and neither the template nor "
            "the tokenizer adds any"
        )
    num_prompt = len(prefix)
    last = prefix.pop()
    input_ids, positions, branches = list(prefix), list(range(num_prompt - 1)), [0] * len(prefix)
    labels: list[int] = []
    for branch, answer in enumerate(answers, start=1):
        answer_ids = tokenizer.encode(answer, add_special_tokens=False)
        input_ids += [last, *answer_ids]
        positions += range(num_prompt - 1, num_prompt + len(answer_ids))
        branches += [branch] * (1 + len(answer_ids))
        labels += [*answer_ids, tokenizer.eos_token_id]
    return EncodedRow(
        input_ids=tuple(input_ids),
        position_ids=tuple(positions),
        branches=tuple(branches),
        labels=tuple(labels),
    )


def plan_batches(lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """Indices of one epoch: rows of similar length together, the batches in random order.

    Sorting keeps padding low; ties are broken at random, so batches differ per epoch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], rng.random()))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(rows: Sequence[EncodedRow], pad_id: int) -> Batch:
    """Pad rows on the left and line their labels up with the columns that predict them."""
    width = max(len(row.input_ids) for row in rows)
    branches = _pad_left((row.branches for row in rows), width, -1)
    if any(row.num_answers > 1 for row in rows):
        mask = _branch_mask(branches)
    else:
        mask = (branches >= 0).long()
    return Batch(
        input_ids=_pad_left((row.input_ids for row in rows), width, pad_id),
        position_ids=_pad_left((row.position_ids for row in rows), width, 0),
        attention_mask=mask,
        labels=_pad_left(
            (row.labels for row in rows), max(len(row.labels) for row in rows), IGNORED
        ),
    )


def _branch_mask(branches: torch.Tensor) -> torch.Tensor:
    """Scores to add, from branch numbers [rows, columns]; padding (-1) sees only padding.

    Letting padding see padding keeps its softmax finite; nothing reads its result.
    """
    query, key = branches[:, :, None], branches[:, None, :]
    seen = ((key == 0) & (query > 0) | (key == query)).tril()
    blocked = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape).masked_fill(~seen, blocked)[:, None]


def _pad_left(rows: Iterable[Sequence[int]], width: int, fill: int) -> torch.Tensor:
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])
