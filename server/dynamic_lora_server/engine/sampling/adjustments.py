"""What a request changes in the scores of its rows before a token is chosen."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import torch

from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.generation import SamplingParams

# What each value of a mask's byte adds to the scores of its eight tokens, [256, 8].
_ADDED = torch.tensor(
    [[0.0 if byte >> bit & 1 else -math.inf for bit in range(8)] for byte in range(256)]
)


class ScoredRow(NamedTuple):
    """Whose next token a row of logits tells, and the drafted tokens that it takes to have come.

    A sequence's rows are neighbours, each with one token more. The next token may be known
    already, of a row of the prompt: it was `told`.
    """

    sequence: Sequence
    ahead: tuple[int, ...] = ()
    told: int | None = None

    @property
    def output_ids(self) -> list[int]:
        """The output so far, but for a token that is not read yet."""
        return [*self.sequence.output_ids, *self.ahead]

    @property
    def num_output(self) -> int:
        """Tokens of the output so far."""
        return self.sequence.num_output + len(self.ahead)

    @property
    def banned_ids(self) -> frozenset[int]:
        """The tokens that would end the sequence sooner than it may."""
        early = self.num_output < self.sequence.sampling.min_new_tokens
        return self.sequence.end_ids if early else frozenset()


@dataclass(frozen=True, slots=True)
class _Seen:
    """Tokens that rows have seen: each one's place in the flattened scores, and whose it is.

    Shapes: places, owners [num_seen], int64; owners are indices of `rows`.
    """

    rows: Seq[ScoredRow]
    places: torch.Tensor
    owners: torch.Tensor

    def of_each(self, value: Callable[[SamplingParams], float]) -> torch.Tensor:
        """A parameter of each token's owner, [num_seen], float32."""
        values = [value(row.sequence.sampling) for row in self.rows]
        column = to_device(values, self.places.device, torch.float32)
        return column.index_select(0, self.owners)


def adjusted(
    logits: torch.Tensor, owners: Seq[ScoredRow], unread: UnreadTokens | None = None
) -> torch.Tensor:
    """Scores [num_rows, vocab] of logits, which stay as they are; themselves if nothing changes.

    In this order: repetition penalty as in CTRL (Keskar et al. 2019), presence and frequency
    penalty as in OpenAI's API, biases, tokens that may not come yet, and those that a
    grammar forbids. -inf is added to these, so that a row which is no finite numbers remains
    one. `unread` has the tokens of sequences whose last one is not read yet.
    """
    adjusting = [
        (row, owner)
        for row, owner in enumerate(owners)
        if owner.sequence.adjusts_scores and owner.told is None
    ]
    if not adjusting:
        return logits
    scores = logits.clone()
    penalised = [one for one in adjusting if one[1].sequence.sampling.penalised]
    if penalised:
        _penalise(scores, penalised, unread)
    _bias(scores, adjusting)
    guided = [one for one in adjusting if one[1].sequence.guide is not None]
    if guided:
        _guide(scores, guided)
    return scores


def _penalise(
    scores: torch.Tensor, owners: Seq[tuple[int, ScoredRow]], unread: UnreadTokens | None
) -> None:
    """A token that was seen twice is written twice, with the same value."""
    flat = scores.view(-1)
    repeating = [one for one in owners if one[1].sequence.sampling.repetition_penalty != 1]
    if repeating:
        seen = _seen(scores, repeating, unread, with_prompts=True)
        values, penalty = flat[seen.places], seen.of_each(lambda one: one.repetition_penalty)
        flat[seen.places] = torch.where(values > 0, values / penalty, values * penalty)
    counting = [one for one in owners if one[1].sequence.sampling.counts_output]
    if counting:
        seen = _seen(scores, counting, unread, with_prompts=False)
        flat[seen.places] = flat[seen.places] - seen.of_each(lambda one: one.presence_penalty)
        flat.index_add_(0, seen.places, seen.of_each(lambda one: -one.frequency_penalty))


def _seen(
    scores: torch.Tensor,
    owners: Seq[tuple[int, ScoredRow]],
    unread: UnreadTokens | None,
    *,
    with_prompts: bool,
) -> _Seen:
    """The tokens of outputs, and of prompts, without virtual tokens: nobody wrote them."""
    device = scores.device
    rows = [row for _, row in owners]
    outputs = [row.output_ids for row in rows]
    parts = [to_device(list(chain.from_iterable(outputs)), device, torch.long)]
    lengths = [len(output) for output in outputs]
    if with_prompts:
        prompts = [_prompt(row.sequence, device) for row in rows]
        parts += prompts
        lengths += [len(prompt) for prompt in prompts]
    lengths += [row.sequence.num_unread for row in rows]
    for row in rows:
        if row.sequence.num_unread:
            assert unread is not None, "a token that nobody has"
            parts.append(unread.of(row.sequence.id))
    whose = to_device([*range(len(rows))] * (len(lengths) // len(rows)), device, torch.long)
    each = torch.repeat_interleave(
        whose, to_device(lengths, device, torch.long), output_size=sum(lengths)
    )
    begins = to_device([row * scores.shape[-1] for row, _ in owners], device, torch.long)
    return _Seen(rows, begins.index_select(0, each) + torch.cat(parts), each)


def _prompt(sequence: Sequence, device: torch.device) -> torch.Tensor:
    """The ids of a prompt, [num_prompt], int64; they are brought to the device once."""
    if sequence.prompt_tensor is None:
        prompt = sequence.prompt_ids[sequence.num_virtual :]
        sequence.prompt_tensor = to_device(prompt, device, torch.long)
    return sequence.prompt_tensor


def _bias(scores: torch.Tensor, owners: Seq[tuple[int, ScoredRow]]) -> None:
    """Add biases, and -inf to tokens that may not come yet."""
    width = scores.shape[-1]
    added = [
        (row * width + token_id, bias)
        for row, owner in owners
        for token_id, bias in chain(
            owner.sequence.sampling.logit_bias,
            ((token_id, -math.inf) for token_id in owner.banned_ids),
        )
        if token_id < width
    ]
    if added:
        places, biases = zip(*added, strict=True)
        flat = scores.view(-1)
        flat.index_add_(
            0,
            to_device(places, scores.device, torch.long),
            to_device(biases, scores.device, scores.dtype),
        )


def _guide(scores: torch.Tensor, owners: Seq[tuple[int, ScoredRow]]) -> None:
    """Add -inf to the scores of tokens that the grammars of these rows forbid."""
    known = not any(owner.sequence.num_unread for _, owner in owners)
    assert known, "a grammar on what is not known yet"
    device, vocab = scores.device, scores.shape[-1]
    packed = torch.frombuffer(_masks([owner for _, owner in owners], vocab), dtype=torch.uint8)
    places = to_device(packed.int(), device)
    added = to_device(_ADDED, device).index_select(0, places).view(len(owners), -1)
    rows = to_device([row for row, _ in owners], device, torch.long)
    scores.index_add_(0, rows, added[:, :vocab])


def _masks(owners: Seq[ScoredRow], vocab: int) -> bytearray:
    """What guides allow in these rows, which all have one, one mask after the other."""
    masks = bytearray()
    for _, rows in groupby(owners, key=lambda owner: owner.sequence.id):
        *_, last = rows
        assert last.sequence.guide is not None
        for mask in last.sequence.guide.allowed(vocab, last.ahead):
            masks += mask
    return masks
