"""What a request must be to be admitted: a prompt of known tokens that fits the context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from dynamic_lora_server.errors import ContextOverflow, InvalidParameter
from dynamic_lora_server.generation import GenerationSpec, SamplingParams
from dynamic_lora_server.serving.work_pool import WorkPool
from dynamic_lora_server.text import TokenizerView

# Prompts that are tokenised at a time: short ones do not wait for a few that are long.
_NUM_ENCODING = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What a request may ask for, in tokens and in places."""

    context_length: int
    max_running: int
    max_waiting: int
    eos_ids: frozenset[int]


class Admission:
    """Tokenises prompts and refuses what cannot be served."""

    def __init__(self, view: TokenizerView, limits: ServiceLimits) -> None:
        self._view = view
        self._limits = limits
        # Who waits here has a place, so that the line is never full.
        self._encoding = WorkPool(
            "encode",
            num_threads=_NUM_ENCODING,
            max_waiting=limits.max_running + limits.max_waiting,
        )

    @property
    def num_waiting(self) -> int:
        """Prompts that wait to be tokenised."""
        return self._encoding.num_waiting

    async def prompt_ids(self, spec: GenerationSpec) -> tuple[int, ...]:
        """The prompt's token ids. Raises InvalidParameter or ContextOverflow."""
        self._check_ids("stop_token_ids", spec.sampling.stop_token_ids)
        self._check_ids("logit_bias", [token_id for token_id, _ in spec.sampling.logit_bias])
        ids = spec.prompt
        if isinstance(ids, str):
            if spec.keep_last is None:
                least = self._view.least_tokens(ids)
                if least > self._limits.context_length:
                    raise self._too_long(f"at least {least}")
            # A long text takes seconds, and the tokenizer releases the GIL.
            ids = await self._encoding.run(
                partial(self._view.encode, ids, add_special_tokens=spec.add_special_tokens)
            )
            if spec.keep_last is not None:
                ids = ids[-spec.keep_last :]
        if not ids:
            raise InvalidParameter(
                "The prompt is empty.", field="inputs", fix="Send at least one character."
            )
        self.fitted(spec, len(ids), 0)
        self._check_ids("inputs", ids)
        return ids

    async def prompt_text(self, spec: GenerationSpec) -> str | None:
        """The text of the prompt, if it is to be given back."""
        if not spec.echo:
            return None
        if isinstance(spec.prompt, str):
            return spec.prompt
        return await self._encoding.run(partial(self._view.decode, spec.prompt))

    def fitted(self, spec: GenerationSpec, num_prompt: int, num_virtual: int) -> SamplingParams:
        """The spec's sampling, with as many new tokens as the context has left at most.

        The prompt and an adapter's virtual tokens count. Raises ContextOverflow if these alone
        fill the context, or if more new tokens were asked for than are left.
        """
        sampling, length = spec.sampling, self._limits.context_length
        left = length - num_virtual - num_prompt
        if left <= 0:
            raise self._too_long(str(num_prompt), num_virtual)
        if sampling.max_new_tokens <= left:
            return sampling
        if spec.clip_output:
            return replace(sampling, max_new_tokens=left)
        raise ContextOverflow(
            f"The prompt has {num_prompt} tokens{_added(num_virtual)} and up to "
            f"{sampling.max_new_tokens} new ones are asked for: "
            f"{length - left + sampling.max_new_tokens} together, but the context holds {length}.",
            field="max_new_tokens",
            fix="Shorten the prompt or ask for fewer tokens.",
        )

    def _too_long(self, number: str, num_virtual: int = 0) -> ContextOverflow:
        return ContextOverflow(
            f"The prompt has {number} tokens{_added(num_virtual)}, but the context holds "
            f"{self._limits.context_length}, the answer included.",
            field="inputs",
            fix="Shorten the prompt.",
        )

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        if not all(0 <= token_id < self._view.vocab_size for token_id in ids):
            what = "The prompt" if field == "inputs" else field
            raise InvalidParameter(
                f"{what} holds a token id outside 0 to {self._view.vocab_size - 1}.", field=field
            )


def _added(num_virtual: int) -> str:
    return f", the adapter adds {num_virtual}" if num_virtual else ""
