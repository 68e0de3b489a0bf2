"""Generation events as `/v1/completions` answers them."""

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import chain

from dynamic_lora_server.answers.openai import FINISH, Stamp, UsageCount, UsageTold, usage_of
from dynamic_lora_server.answers.streams import Generation, WholeAnswer, merge
from dynamic_lora_server.generation import Echo, Finish, FinishReason, GenerationEvent, TokenPiece
from dynamic_lora_server.http.sse import event
from dynamic_lora_server.schemas import openai_answers as wire

# Tokens of a prompt in one event, which is written in a millisecond or two; fewer where each has
# others beside it.
_MAX_ECHOED = 64


class CompletionAnswer:
    """Writes the answers to one request: choice `p * n + i` is continuation i of prompt p.

    With `only_prompt` nothing is told of what follows the prompts that are given back.
    """

    def __init__(
        self,
        *,
        model: str,
        fingerprint: str,
        n: int,
        logprobs: bool,
        usage: UsageTold,
        only_prompt: bool = False,
    ) -> None:
        self._stamp = Stamp.new("cmpl", model=model, fingerprint=fingerprint)
        self._n = n
        self._with_logprobs = logprobs
        self._only_prompt = only_prompt
        self._usage = usage

    def whole(self, prompts: Sequence[Sequence[WholeAnswer]]) -> wire.Completion:
        """The answer that is sent at once."""
        if self._only_prompt:
            prompts = [[_without_answer(one) for one in each] for each in prompts]
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
        widths: dict[tuple[int, int], int] = {}  # of what was given back before each choice
        for position, generation in enumerate(generations):
            count.begin(position, generation.started)
        always = self._usage is UsageTold.ALWAYS
        async with aclosing(merge([generation.events for generation in generations])) as events:
            async for position, event_ in events:
                current = _finish_alone(event_) if self._only_prompt else event_
                if current is None:
                    continue
                count.note(position, current)
                if isinstance(current, Echo):
                    widths[position, current.index] = len(current.text)
                    for part in _parts(current):
                        usage = count.so_far() if always else None
                        yield event(self._completion([self._echoed(position, part)], usage))
                        await asyncio.sleep(0)  # others write, too
                    continue
                choice = self._piece(position, current, widths)
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
            text=continuation.prompt + finish.text,
            logprobs=self._logprobs(
                continuation.prompt_pieces, continuation.pieces, len(continuation.prompt)
            ),
            finish_reason=FINISH[finish.reason],
        )

    def _echoed(self, position: int, echo: Echo) -> wire.CompletionChoice:
        return wire.CompletionChoice(
            index=position * self._n + echo.index,
            text=echo.text,
            logprobs=self._logprobs(echo.pieces, (), 0),
        )

    def _piece(
        self, position: int, current: GenerationEvent, widths: Mapping[tuple[int, int], int]
    ) -> wire.CompletionChoice | None:
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
            logprobs=self._logprobs((), [current], widths.get((position, current.index), 0)),
        )

    def _logprobs(
        self, prompt: Iterable[TokenPiece], answer: Sequence[TokenPiece], width: int
    ) -> wire.CompletionLogprobs | None:
        """Of a prompt's tokens and of an answer's, which comes behind `width` characters."""
        if not self._with_logprobs:
            return None
        tokens: list[str] = []
        logprobs: list[float | None] = []
        offsets: list[int] = []
        for pieces, start in ((prompt, 0), (answer, width)):
            for piece in pieces:
                tokens.append(piece.token_text)
                logprobs.append(piece.logprob)
                offsets.append(start + piece.offset)
        return wire.CompletionLogprobs(
            tokens=tokens,
            token_logprobs=logprobs,
            top_logprobs=(_top(piece) for piece in chain(prompt, answer)),
            text_offset=offsets,
        )


def _parts(echo: Echo) -> Iterator[Echo]:
    """A prompt so many tokens at a time; all of its text comes with the first."""
    part: list[TokenPiece] = []
    room, text = _MAX_ECHOED, echo.text
    for piece in echo.pieces:
        part.append(piece)
        room -= 1 + len(piece.top) // 4
        if room <= 0:
            yield replace(echo, text=text, pieces=part)
            part, room, text = [], _MAX_ECHOED, ""
    if part or text:
        yield replace(echo, text=text, pieces=part)


def _without_answer(whole: WholeAnswer) -> WholeAnswer:
    return replace(whole, finish=_emptied(whole.finish), pieces=[])


def _finish_alone(event: GenerationEvent) -> GenerationEvent | None:
    """What is left of a stream of which only the prompt is wanted."""
    if isinstance(event, TokenPiece):
        return None
    return _emptied(event) if isinstance(event, Finish) else event


def _emptied(finish: Finish) -> Finish:
    return replace(finish, reason=FinishReason.LENGTH, text="", tail="", num_output_tokens=0)


def _top(piece: TokenPiece) -> dict[str, float] | None:
    """The token and the most likely ones, at most one more than asked for."""
    if piece.logprob is None:
        return None
    top = {piece.token_text: piece.logprob}
    for token in piece.top:
        # Two tokens may read the same: there is a place for the likelier.
        top[token.text] = max(token.logprob, top.get(token.text, -math.inf))
    return top
