"""What the kinds of OpenAI answers share."""

import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum, auto

from dynamic_lora_server.generation import (
    Finish,
    FinishReason,
    GenerationEvent,
    Started,
    TokenPiece,
)
from dynamic_lora_server.http.problems import openai_error, stream_fault
from dynamic_lora_server.http.sse import DONE, json_event
from dynamic_lora_server.schemas import openai_answers as wire
from dynamic_lora_server.schemas.openai import StreamOptions

FINISH: dict[FinishReason, wire.FinishName] = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str  # of the base model, as it is served

    @classmethod
    def new(cls, prefix: str, *, model: str, fingerprint: str) -> "Stamp":
        """A stamp for an answer that begins now."""
        return cls(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model,
            fingerprint=fingerprint,
        )


class UsageTold(Enum):
    """When a stream tells the token counts."""

    NEVER = auto()
    AT_THE_END = auto()
    ALWAYS = auto()  # and at its end

    @classmethod
    def of(cls, options: StreamOptions | None) -> "UsageTold":
        """What a request asks for."""
        if options is None or not options.include_usage:
            return cls.NEVER
        return cls.ALWAYS if options.continuous_usage_stats else cls.AT_THE_END


@dataclass(slots=True)
class UsageCount:
    """Token counts of a request; each prompt counts once, whatever `n` is."""

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    num_output_tokens: int = 0
    num_pieces: int = 0

    def begin(self, prompt: int, started: Started) -> None:
        """Count the prompt at this position, before anything of it is answered."""
        self.prompts[prompt] = started.num_prompt_tokens

    def note(self, prompt: int, event: GenerationEvent) -> None:
        """Count what a stream answers to the prompt at this position."""
        if isinstance(event, TokenPiece):
            self.num_pieces += 1
        elif isinstance(event, Finish):
            self.add(prompt, event)

    def add(self, prompt: int, finish: Finish) -> None:
        """Count one continuation of the prompt at this position."""
        self.prompts[prompt] = finish.num_prompt_tokens
        # Continuations after the first find what the first has computed.
        found = self.cached.get(prompt, finish.num_cached_tokens)
        self.cached[prompt] = min(found, finish.num_cached_tokens)
        self.num_output_tokens += finish.num_output_tokens

    def answer(self) -> wire.Usage:
        """The counts as OpenAI names them."""
        details = wire.PromptTokensDetails(cached_tokens=sum(self.cached.values()))
        return self._usage(self.num_output_tokens, details)

    def so_far(self) -> wire.Usage:
        """The counts while a stream goes on."""
        return self._usage(self.num_pieces, None)

    def _usage(
        self, num_output_tokens: int, details: wire.PromptTokensDetails | None
    ) -> wire.Usage:
        num_prompt_tokens = sum(self.prompts.values())
        return wire.Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            prompt_tokens_details=details,
        )


def usage_of(finishes: Iterable[tuple[int, Finish]]) -> wire.Usage:
    """The usage of whole continuations, each with its prompt's position."""
    count = UsageCount()
    for prompt, finish in finishes:
        count.add(prompt, finish)
    return count.answer()


def logprob_of(piece: TokenPiece) -> wire.ChatLogprob:
    """A token with its log-probability, and those of the most likely ones."""
    assert piece.logprob is not None
    return wire.ChatLogprob(
        token=piece.token_text,
        logprob=piece.logprob,
        bytes=list(piece.token_bytes),
        top_logprobs=[
            wire.TopLogprob(token=token.text, logprob=token.logprob, bytes=list(token.token_bytes))
            for token in piece.top
        ],
    )


async def framed(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """End a stream as OpenAI does: `[DONE]`, or an error object after a failure."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            fault = stream_fault(error)
            # The Hub's client reads a stream of OpenAI's as one of TGI's.
            yield json_event({**openai_error(fault), "error_type": fault.kind.error_type})
        else:
            yield DONE
