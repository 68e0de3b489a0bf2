"""Generation events as `/v1/completions` answers them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from dynamic_lora_server.answers.openai import FINISH, Stamp, UsageCount, UsageTold, usage_of
from dynamic_lora_server.generation import Finish, GenerationEvent, TokenPiece
from dynamic_lora_server.schemas import openai_answers as wire
from dynamic_lora_server.sse import event
from dynamic_lora_server.streams import Generation, WholeAnswer, merge


class CompletionAnswer:
    """Writes the answers to one request: choice `p * n + i` is continuation i of prompt p."""

    def __init__(
        self, *, model: str, fingerprint: str, n: int, logprobs: bool, usage: UsageTold
    ) -> None:
        self._stamp = Stamp.new("cmpl", model=model, fingerprint=fingerprint)
        self._n = n
        self._with_logprobs = logprobs
        self._usage = usage

    def whole(self, prompts: Sequence[Sequence[WholeAnswer]]) -> wire.Completion:
        """The answer that is sent at once."""
        choices = [
            self._choice(position, continuation)
            for position, continuations in enumerate(prompts)
            for continuation in continuations
        ]
        usage = usage_of((p, c.finish) for p, cs in enumerate(prompts) for c in cs)
        return self._completion(choices, usage)

    async def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[bytes, None]:
        """A chunk for each piece of text, one for each end, and the usage if asked for."""
        count = UsageCount()
        for position, generation in enumerate(generations):
            count.begin(position, generation.started)
        always = self._usage is UsageTold.ALWAYS
        async with aclosing(merge([generation.events for generation in generations])) as events:
            async for position, current in events:
                count.note(position, current)
                choice = self._piece(position, current)
                if choice is not None:
                    usage = count.so_far() if always else None
                    yield event(self._completion([choice], usage))
        if self._usage is not UsageTold.NEVER:
            yield event(self._completion([], count.answer()))

    def _completion(
        self, choices: list[wire.CompletionChoice], usage: wire.Usage | None
    ) -> wire.Completion:
        stamp = self._stamp
        return wire.Completion(
            id=stamp.id,
            created=stamp.created,
            model=stamp.model,
            system_fingerprint=stamp.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _choice(self, position: int, continuation: WholeAnswer) -> wire.CompletionChoice:
        finish = continuation.finish
        return wire.CompletionChoice(
            index=position * self._n + finish.index,
            text=finish.text,
            logprobs=self._logprobs(continuation.pieces),
            finish_reason=FINISH[finish.reason],
        )

    def _piece(self, position: int, current: GenerationEvent) -> wire.CompletionChoice | None:
        if isinstance(current, Finish):
            return wire.CompletionChoice(
                index=position * self._n + current.index,
                text=current.tail,
                finish_reason=FINISH[current.reason],
            )
        if not isinstance(current, TokenPiece) or not (current.text or self._with_logprobs):
            return None
        return wire.CompletionChoice(
            index=position * self._n + current.index,
            text=current.text,
            logprobs=self._logprobs([current]),
        )

    def _logprobs(self, pieces: Sequence[TokenPiece]) -> wire.CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        return wire.CompletionLogprobs(
            tokens=[piece.token_text for piece in pieces],
            token_logprobs=[piece.logprob for piece in pieces],
            top_logprobs=[_top(piece) for piece in pieces],
            text_offset=[piece.offset for piece in pieces],
        )


def _top(piece: TokenPiece) -> dict[str, float]:
    """The sampled token and the most likely ones, at most one more than asked for."""
    assert piece.logprob is not None
    top = {piece.token_text: piece.logprob}
    for token in piece.top:
        # Two tokens may read the same; the sampled one keeps the key, or else the likelier.
        top.setdefault(token.text, token.logprob)
    return top
