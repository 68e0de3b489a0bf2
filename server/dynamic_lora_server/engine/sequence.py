"""One continuation on its way through the engine. Imports no torch."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from dynamic_lora_server.engine.kv.space import Allocation
from dynamic_lora_server.generation import FinishReason, SamplingParams

if TYPE_CHECKING:
    import torch

    from dynamic_lora_adapters.device.slab import ResidentAdapter
    from dynamic_lora_adapters.terms import PromptTerms
    from dynamic_lora_server.engine.sampling.guides import Guide


class Phase(Enum):
    """Where a sequence is in its life; ENDED is reached exactly once."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Tokens and progress of one continuation.

    `num_computed` counts the tokens whose KV entries are in the cache, or will be when the
    steps that were started have run; `num_unread` the tokens at the end that such a step
    chooses and that are not in `output_ids` yet. `seed` fixes every random draw: draw i
    depends on the seed and i alone. The first `num_virtual` ids of `prompt_ids` stand for
    an adapter's virtual tokens. The KV entries of the first `num_reused` tokens were in
    the prefix cache.

    The adapter acts on tokens from position `active_from` on: from the start,
    or, if it has invocation tokens, from their last occurrence in the prompt,
    as PEFT does it (aLoRA, Greenewald et al. 2025); without one, never.
    `num_run` counts tokens that were run through the model for the answer, `num_merged`
    those of them that ran while the weights held the adapter. A `guide` says which tokens
    may come.
    """

    id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    seed: int
    adapter: "ResidentAdapter | None" = None
    guide: "Guide | None" = None
    num_virtual: int = field(default=0, init=False)
    active_from: int = field(default=0, init=False)
    output_ids: list[int] = field(default_factory=list)
    num_unread: int = 0
    num_computed: int = 0
    num_run: int = 0
    num_merged: int = 0
    num_reused: int = 0
    block_keys: tuple[bytes, ...] = ()  # where prefixes are kept
    num_kept: int = 0  # blocks that were offered to the prefix cache
    num_lasting: int | None = None  # leading tokens whose KV entries others may take; None: all
    prompt_tensor: "torch.Tensor | None" = None  # of its ids, where the sampler needs them
    phase: Phase = Phase.WAITING
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        prompt = self.prompt_terms
        if prompt is not None:
            self.num_virtual = prompt.num_tokens
            self.prompt_ids = (0,) * prompt.num_tokens + self.prompt_ids
        self.active_from = self._find_invocation()

    @property
    def adapter_digest(self) -> str | None:
        """The content digest of the adapter; None for the base model."""
        return None if self.adapter is None else self.adapter.digest

    @property
    def prompt_terms(self) -> "PromptTerms | None":
        """The virtual tokens that the adapter puts before the prompt."""
        rows = None if self.adapter is None else self.adapter.rows
        return None if rows is None else rows.prompt

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, without virtual ones."""
        return len(self.prompt_ids) - self.num_virtual

    @property
    def num_given(self) -> int:
        """Leading tokens whose KV entries are given by the adapter, not computed."""
        prompt = self.prompt_terms
        return prompt.num_tokens if prompt is not None and prompt.keys else 0

    @property
    def num_cached_prompt(self) -> int:
        """Tokens of the prompt, without virtual ones, that were found in the prefix cache."""
        return max(self.num_reused - self.num_virtual, 0)

    def _find_invocation(self) -> int:
        invocation = () if self.adapter is None else self.adapter.invocation_ids
        if not invocation:
            return 0
        width = len(invocation)
        for start in range(len(self.prompt_ids) - width, -1, -1):
            if self.prompt_ids[start : start + width] == invocation:
                return start
        return self.max_tokens

    @property
    def num_output(self) -> int:
        """Tokens of the output, with those that are not read yet."""
        return len(self.output_ids) + self.num_unread

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + self.num_output

    @property
    def max_tokens(self) -> int:
        """The longest this sequence can get."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet run through the model."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions `start:stop`, but for those that are not read yet."""
        num_prompt = len(self.prompt_ids)
        head = self.prompt_ids[start:stop]
        tail = self.output_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]
        return [*head, *tail]

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens with which the sequence ends."""
        ends = frozenset(self.sampling.stop_token_ids)
        return ends if self.sampling.ignore_eos else ends | self.stop_ids

    @property
    def adjusts_scores(self) -> bool:
        """Whether which token comes next depends on more than the logits."""
        sampling = self.sampling
        biased = sampling.penalised or sampling.logit_bias or sampling.min_new_tokens
        return bool(biased) or self.guide is not None

    def take(self, token_id: int) -> FinishReason | None:
        """Add a token to the output; why the sequence ends with it, or None if it goes on."""
        self.output_ids.append(token_id)
        reason = self.finish_reason()
        if self.guide is None or reason in (FinishReason.STOP, FinishReason.EOS):
            return reason
        return FinishReason.EOS if self.guide.take(token_id) else reason

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
