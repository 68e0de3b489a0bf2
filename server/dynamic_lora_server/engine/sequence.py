"""One continuation on its way through the engine. Imports no torch."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from dynamic_lora_server.engine.kv_space import Allocation
from dynamic_lora_server.generation import FinishReason, SamplingParams

if TYPE_CHECKING:
    from dynamic_lora_adapters.slots import ResidentAdapter


class Phase(Enum):
    """Where a sequence is in its life; ENDED is reached exactly once."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Tokens and progress of one continuation.

    `num_computed` counts the tokens whose KV entries are in the cache. `seed`
    fixes every random draw: draw i depends on the seed and i alone.
    """

    id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    seed: int
    adapter: "ResidentAdapter | None" = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    phase: Phase = Phase.WAITING
    allocation: Allocation | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_tokens(self) -> int:
        """The longest this sequence can get."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet run through the model."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions `start:stop`."""
        num_prompt = len(self.prompt_ids)
        head = self.prompt_ids[start:stop]
        tail = self.output_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]
        return [*head, *tail]

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends after its latest token, or None if it goes on."""
        if not self.output_ids:
            return None
        last = self.output_ids[-1]
        if last in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if last in self.stop_ids and not self.sampling.ignore_eos:
            return FinishReason.EOS
        if len(self.output_ids) >= self.sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None
