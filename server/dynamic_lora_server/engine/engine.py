"""One step at a time: schedule, run, sample, emit."""

from dataclasses import dataclass

import torch

from dynamic_lora_adapters.native.peaks import NativePeaks
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.sampler import Sampled, sample
from dynamic_lora_server.engine.scheduler import Piece, Scheduler
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.generation import FinishReason


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A sequence got a token; with a `reason` it is the last and the sequence has ended."""

    sequence_id: int
    sampled: Sampled
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A sequence ended because its step broke."""

    sequence_id: int
    message: str


EngineEvent = TokenEvent | FailedEvent


class Engine:
    """Runs sequences to their ends. Not thread-safe: one thread owns it.

    `peaks` is how logits are searched, where not by torch.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        modes: ModeController,
        peaks: NativePeaks | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.modes = modes
        self.runner = runner
        self.num_steps = 0
        self._peaks = peaks

    @property
    def on_host(self) -> bool:
        """Whether steps are computed by the processor."""
        return self.runner.model.device.type == "cpu"

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at once, wherever it is; nothing if it has ended already."""
        self.scheduler.end(sequence)

    def step(self) -> list[EngineEvent]:
        """Run one step and return what happened to whom."""
        pieces = self.scheduler.schedule()
        if not pieces:
            return []
        self.num_steps += 1
        try:
            self.modes.before_step(pieces, self.scheduler.num_by_adapter)
            tokens = self._run(pieces)
        except Exception as error:  # whatever broke, the sequences of this step must end
            return self._fail(pieces, error)
        return self._commit(pieces, tokens)

    @torch.inference_mode()
    def _run(self, pieces: list[Piece]) -> dict[int, Sampled | None]:
        self.runner.cache.copy(self.scheduler.take_copies())
        sampled, logits = self.runner.run(pieces)
        sequences = [piece.sequence for piece in sampled]
        if not sequences:
            return {}
        tokens = sample(logits, sequences, self._peaks)
        return {s.id: token for s, token in zip(sequences, tokens, strict=True)}

    def _commit(self, pieces: list[Piece], tokens: dict[int, Sampled | None]) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        for piece in pieces:
            sampled = tokens.get(piece.sequence.id)
            if sampled is None and piece.sequence.id in tokens:
                events += self._fail([piece], ArithmeticError("its logits are no finite numbers"))
                continue
            reason = self.scheduler.advance(piece, None if sampled is None else sampled.token_id)
            if sampled is not None:
                events.append(TokenEvent(piece.sequence.id, sampled, reason))
        return events

    def _fail(self, pieces: list[Piece], error: Exception) -> list[EngineEvent]:
        message = f"{type(error).__name__}: {error}"
        for piece in pieces:
            self.scheduler.end(piece.sequence)
        self.scheduler.forget_prefixes()
        return [FailedEvent(piece.sequence.id, message) for piece in pieces]
