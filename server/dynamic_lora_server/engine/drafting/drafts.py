"""Drafts: tokens that are run before they are known to come, in case they do.

Speculative decoding (Leviathan et al. 2023) without a second model: a sequence's next tokens
are guessed (`phrases.py`), run behind its last one in the same step, and kept as far as the
model, whose choice after each of them is then known, chooses the same. What is generated is
what would have been without: penalties and grammars take the drafted tokens before a choice
for said. Imports no torch.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from dynamic_lora_server.engine.drafting.phrases import Speakers, Text
from dynamic_lora_server.engine.drafting.step_times import StepTimes
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.modes.costs import StepCosts

# With the token before them no more than attention in C++ takes one by one.
MAX_DRAFT = 7
# A token that comes with less chance is worth no row on any machine.
_LEAST_CHANCE = 0.05
# What drafts must bring to be made: less lies within what times are known to.
_MIN_GAIN = 1.05

Draft = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DraftStats:
    """Tokens that were drafted and run, and those of them that came."""

    num_drafted: int
    num_accepted: int


class Drafter:
    """Drafts at most `most` tokens a sequence and step, and only while sequences gain by it.

    What a step of so many rows takes is known from `costs` and from the steps that were. The
    engine's thread owns it.
    """

    def __init__(self, costs: StepCosts, most: int) -> None:
        if not 1 <= most <= MAX_DRAFT:
            raise ValueError(f"most must lie between 1 and {MAX_DRAFT}, got {most}")
        self._times = StepTimes(costs.base)
        self._most = most
        self._speakers = Speakers()
        self._texts: dict[int, Text] = {}
        self._num_drafted = 0
        self._num_accepted = 0

    def draft(self, decoding: Seq[Sequence], room: int) -> dict[int, Draft]:
        """What to run behind the last tokens of these sequences, by sequence id.

        They have a row each in the next step, which has room for so many rows more.
        """
        offers = [offer for sequence in decoding for offer in self._offers(sequence)]
        # Along a draft gains fall, and equal ones stay in their order.
        offers.sort(key=lambda offer: offer[0], reverse=True)
        gains = [gain for gain, _, _ in offers[:room]]
        drafts: dict[int, Draft] = {}
        for _, sequence_id, token_id in offers[: self._worth(gains, len(decoding))]:
            drafts[sequence_id] = (*drafts.get(sequence_id, ()), token_id)
        return drafts

    def _worth(self, gains: Seq[float], num_rows: int) -> int:
        """How many of these tokens make the sequences fastest, by the geometric mean.

        By the sum of their tokens a second, one sequence that is easily guessed would slow all
        others down. So it may only as far as its speed grows by more than theirs together fall.
        """
        alone = self._times.of(num_rows)
        gained, best, most = 0.0, 0, math.log(_MIN_GAIN)
        for count, gain in enumerate(gains, 1):
            gained += gain
            slower = self._times.of(num_rows + count) / max(alone, 1e-9)
            faster = gained / num_rows - math.log(max(slower, 1.0))
            if faster > most:
                best, most = count, faster
        return best

    def _offers(self, sequence: Sequence) -> list[tuple[float, int, int]]:
        """What each token of a draft adds to the logarithm of the tokens that a step brings."""
        offers = []
        expected = 1.0
        for token_id, chance in self._expected(sequence):
            offers.append((math.log1p(chance / expected), sequence.id, token_id))
            expected += chance
        return offers

    def _expected(self, sequence: Sequence) -> list[tuple[int, float]]:
        left = sequence.sampling.max_new_tokens - sequence.num_output - 1
        if left <= 0:
            return []
        path = None if sequence.guide is None else sequence.guide.path()
        return self._text(sequence).expected(
            min(self._most, left), _LEAST_CHANCE, sequence.end_ids, path
        )

    def _text(self, sequence: Sequence) -> Text:
        """What there is of a sequence."""
        if sequence.id not in self._texts:
            speaker = self._speakers.of(sequence.adapter_digest)
            prompt = sequence.prompt_ids[sequence.num_virtual :]
            self._texts[sequence.id] = Text(speaker, prompt)
        return self._texts[sequence.id]

    def hear(self, sequence: Sequence, token_ids: Seq[int], num_drafted: int) -> None:
        """A sequence got these tokens, all but the last of them drafted, as were so many."""
        self._num_drafted += num_drafted
        self._num_accepted += len(token_ids) - 1
        self._text(sequence).hear(token_ids)

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of nothing but decoding sequences, drafts included, took so long."""
        self._times.observe(num_rows, seconds)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended. What it said stays known of its adapter."""
        self._texts.pop(sequence.id, None)

    def stats(self) -> DraftStats:
        """Counts since the start; may be read from any thread."""
        return DraftStats(self._num_drafted, self._num_accepted)
