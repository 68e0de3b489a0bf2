"""One step at a time: schedule, run, choose tokens, emit.

On a GPU steps overlap: the next one is scheduled and queued while the device still
runs the one before, whose tokens it reads on the device, and the host reads them
after that. The device then has its next step when it is done with one. A sequence that
turns out to have ended has a row too many in the step that is already on its way; nobody
reads it. A grammar must have a sequence's last token to say which may come next, so a step
that chooses one by a grammar is read before the next is scheduled.
(The idea is NanoFlow's, Zhu et al. 2024; SGLang and vLLM do likewise.)
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dynamic_lora_adapters.apply.merge import WeightsLost
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.native.head import Highest
from dynamic_lora_adapters.native.sampling import NativeSampling
from dynamic_lora_adapters.transfer import milestone
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.model_runner import GreedyOnly, ModelRunner
from dynamic_lora_server.engine.sampling.adjustments import ScoredRow
from dynamic_lora_server.engine.sampling.sampler import (
    Choice,
    Sampled,
    choose,
    choose_highest,
    takes_highest,
)
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.engine.scheduler import Piece, Scheduler
from dynamic_lora_server.engine.sequence import Phase, Sequence
from dynamic_lora_server.generation import FinishReason
from dynamic_lora_server.noop import noop

logger = logging.getLogger(__name__)

# No step that follows would be right: the weights are gone, or CUDA refuses every later call, as
# it does after an illegal access.
_FATAL: tuple[type[Exception], ...] = (WeightsLost, torch.AcceleratorError)
_NOT_FINITE = "its logits are no finite numbers"


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A sequence got a token; with a `reason` it is the last and the sequence has ended."""

    sequence_id: int
    sampled: Sampled
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The next tokens of a sequence's prompt, with their log-probabilities; not the first one."""

    sequence_id: int
    tokens: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A sequence ended because its step broke, or no token could be chosen: by its grammar, or
    because its logits are no numbers."""

    sequence_id: int
    message: str
    by_grammar: bool = False


EngineEvent = TokenEvent | PromptEvent | FailedEvent


class _Outcome(NamedTuple):
    """What came of a piece: tokens of the prompt, and those that were sampled."""

    piece: Piece
    told: Seq[Sampled | None]
    sampled: Seq[Sampled | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepUnderway:
    """A step that was given to the device.

    `choice` has a row for each token: by sequence id, `first_rows` are the first that are sampled,
    `told` those of prompts. `merged` was in the weights.
    """

    pieces: Seq[Piece]
    choice: Choice | None
    first_rows: dict[int, int]
    told: dict[int, slice]
    merged: ResidentAdapter | None
    wait: Callable[[], None]

    @property
    def unread(self) -> UnreadTokens | None:
        """The tokens it chooses."""
        return None if self.choice is None else UnreadTokens(self.choice.token_ids, self.first_rows)

    @property
    def is_guided(self) -> bool:
        """Whether it chooses a token by a grammar."""
        sequences = (piece.sequence for piece in self.pieces)
        return any(one.guide is not None and one.id in self.first_rows for one in sequences)

    def read(self) -> list[_Outcome]:
        """What came of each piece, once the step was waited for.

        Of tokens that were chosen after a draft's, there are those whose draft is right.
        """
        tokens = [] if self.choice is None else self.choice.read()
        outcomes = []
        for piece in self.pieces:
            first, told = self.first_rows.get(piece.sequence.id), self.told.get(piece.sequence.id)
            sampled = [] if first is None else _borne_out(tokens[first:], piece)
            outcomes.append(_Outcome(piece, [] if told is None else tokens[told], sampled))
        return outcomes


def _borne_out(tokens: Seq[Sampled | None], piece: Piece) -> list[Sampled | None]:
    """The first of a sequence's tokens, and those behind it for as long as it was foreseen.

    Behind a token that ends the sequence nothing comes.
    """
    ends = piece.sequence.end_ids
    for number, guess in enumerate(piece.draft):
        token = tokens[number]
        if token is None or token.token_id != guess or guess in ends:
            return list(tokens[: number + 1])
    return list(tokens[: len(piece.draft) + 1])


class Engine:
    """Runs sequences to their ends. Not thread-safe: one thread owns it.

    `sampling` chooses tokens in C++; None: torch does. With `overlap` a step is
    started before the one before is read; `waited_s` are the seconds that the host had nothing
    to do but wait for the device. Raises ValueError with that and a scheduler that
    drafts, which must know a step's tokens before the next one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        modes: ModeController,
        sampling: NativeSampling | None = None,
        *,
        overlap: bool = False,
    ) -> None:
        if overlap and scheduler.drafter is not None:
            raise ValueError("steps that overlap cannot draft")
        self.scheduler = scheduler
        self.modes = modes
        self.runner = runner
        self.overlap = overlap
        self.num_steps = 0
        self.num_overlapped = 0
        self.waited_s = 0.0
        self._sampling = sampling
        self._underway: _StepUnderway | None = None

    @property
    def on_host(self) -> bool:
        """Whether steps are computed by the processor."""
        return self.runner.cache.device.type == "cpu"

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work or self._underway is not None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at once, wherever it is; nothing if it has ended already."""
        self.scheduler.end(sequence)

    def step(self, before_compute: Callable[[], object] = noop) -> list[EngineEvent]:
        """Run one step and return what happened to whom.

        With `overlap`, start one step and return what came of the one before. On a CPU
        `before_compute` is called before this thread releases the GIL for long, and not at all if
        it never does. Raises WeightsLost, and torch.AcceleratorError, after which CUDA does nothing
        more.
        """
        begin = time.perf_counter()
        events = self.finish() if self._underway is not None and self._underway.is_guided else []
        pieces = self.scheduler.schedule()
        underway, error = self._try_start(pieces, before_compute)
        events += self.finish()
        self._underway = underway
        if error is not None:
            # Sequences being moved may be half copied: fail them too.
            events += self._fail(pieces, error, self.scheduler.moved)
        if self.overlap:
            return events
        events += self.finish()
        if error is None:
            self.scheduler.observe(pieces, time.perf_counter() - begin)
        return events

    def _try_start(
        self, pieces: list[Piece], before_compute: Callable[[], object]
    ) -> tuple[_StepUnderway | None, Exception | None]:
        """The step of these pieces, or why it broke; neither where there are none."""
        if not pieces:
            return None, None
        try:
            started = self._start(pieces, before_compute)
        except _FATAL:
            raise
        except Exception as error:  # whatever broke, the sequences of this step must end
            return None, error
        self.num_steps += 1
        self.num_overlapped += self._underway is not None
        return started, None

    @torch.inference_mode()
    def _start(self, pieces: list[Piece], before_compute: Callable[[], object]) -> _StepUnderway:
        unread = None if self._underway is None else self._underway.unread
        self.modes.before_step(pieces, self.scheduler.num_by_adapter, before_compute)
        if copies := self.scheduler.take_copies():
            before_compute()
            self.runner.cache.copy(copies)
        first_rows, told, choice = self._run(pieces, unread, before_compute)
        wait = milestone(self.runner.cache.device)
        for piece in pieces:
            self.scheduler.begin(piece, lasting=self.runner.lasts(piece.sequence))
        return _StepUnderway(
            pieces=pieces,
            choice=choice,
            first_rows=first_rows,
            told=told,
            merged=self.runner.merger.merged,
            wait=wait,
        )

    def _run(
        self,
        pieces: list[Piece],
        unread: UnreadTokens | None,
        before_compute: Callable[[], object],
    ) -> tuple[dict[int, int], dict[int, slice], Choice | None]:
        """Each sampling sequence's first row, the prompt rows by sequence, and the choice."""
        scoring = [piece.sequence for piece in pieces if piece.num_scored]
        greedy_only = None
        if self._sampling is not None and all(map(takes_highest, scoring)):
            greedy_only = GreedyOnly(any(sequence.sampling.logprobs for sequence in scoring))
        scored, scores = self.runner.run(
            pieces, unread, greedy_only=greedy_only, before_compute=before_compute
        )
        rows: list[ScoredRow] = []
        first_rows, told = {}, {}
        for piece in scored:
            sequence, begin = piece.sequence, len(rows)
            rows += [ScoredRow(sequence, told=token_id) for token_id in piece.told_ids]
            told[sequence.id] = slice(begin, len(rows))
            if piece.samples:
                first_rows[sequence.id] = len(rows)
            rows += [ScoredRow(sequence, piece.draft[:n]) for n in range(piece.num_sampled)]
        if not rows:
            return first_rows, told, None
        if isinstance(scores, Highest):
            return first_rows, told, choose_highest(scores, rows)
        return first_rows, told, choose(scores, rows, self._sampling, unread)

    def finish(self) -> list[EngineEvent]:
        """Wait for the step under way, if there is one, and return what came of it.

        Raises torch.AcceleratorError, as `step` does.
        """
        underway, self._underway = self._underway, None
        if underway is None:
            return []
        begin = time.perf_counter()
        try:
            underway.wait()
            self.waited_s += time.perf_counter() - begin
            outcomes = underway.read()
        except _FATAL:
            raise
        except Exception as error:
            return self._fail(underway.pieces, error)
        events: list[EngineEvent] = []
        for outcome in outcomes:
            if outcome.piece.sequence.phase is not Phase.ENDED:
                events += self._settle(outcome, underway.merged)
        return events

    def _settle(self, outcome: _Outcome, merged: ResidentAdapter | None) -> list[EngineEvent]:
        piece, sequence = outcome.piece, outcome.piece.sequence
        told = tuple(token for token in outcome.told if token is not None)
        sampled = [token for token in outcome.sampled if token is not None]
        if len(told) < len(outcome.told):
            return [self._give_up(sequence, None)]
        if len(sampled) < len(outcome.sampled):
            guide = sequence.guide
            by_grammar = None if guide is None else guide.failures[len(sampled)]
            return [self._give_up(sequence, by_grammar)]
        num_run = sequence.num_run
        num_taken, reason = self.scheduler.settle(piece, [token.token_id for token in sampled])
        if merged is not None and sequence.adapter is merged:
            sequence.num_merged += sequence.num_run - num_run
        events = [TokenEvent(sequence.id, token, None) for token in sampled[:num_taken]]
        if reason is not None:
            events[-1] = replace(events[-1], reason=reason)
        return [*([PromptEvent(sequence.id, told)] if told else []), *events]

    def _give_up(self, sequence: Sequence, by_grammar: str | None) -> FailedEvent:
        """End a sequence for which no token could be chosen, in a step that is sound otherwise.

        Either its grammar says why, or its logits are no numbers.
        """
        if by_grammar is not None:
            # What others find of it in the prefix cache is sound.
            self.scheduler.end(sequence)
            return FailedEvent(sequence.id, by_grammar, by_grammar=True)
        self.scheduler.discard(sequence)
        return FailedEvent(sequence.id, _NOT_FINITE)

    def _fail(
        self, pieces: Seq[Piece], error: Exception, others: Seq[Sequence] = ()
    ) -> list[EngineEvent]:
        # Here alone: clients, and those who log their requests, get the error's text and no more.
        logger.error("A step failed", exc_info=error)
        message = f"{type(error).__name__}: {error}"
        sequences = [*(piece.sequence for piece in pieces), *others]
        ended = [sequence for sequence in sequences if self.scheduler.end(sequence)]
        self.scheduler.forget_prefixes()
        return [FailedEvent(sequence.id, message) for sequence in ended]
