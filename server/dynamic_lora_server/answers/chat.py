"""Generation events as `/v1/chat/completions` answers them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from dynamic_lora_server.answers.openai import FINISH, Stamp, UsageCount, UsageTold, usage_of
from dynamic_lora_server.generation import Finish, GenerationEvent, TokenPiece
from dynamic_lora_server.schemas import openai_answers as wire
from dynamic_lora_server.sse import event
from dynamic_lora_server.streams import Generation, WholeAnswer


class ChatAnswer:
    """Writes the answers to one request."""

    def __init__(
        self, *, model: str, fingerprint: str, n: int, logprobs: bool, usage: UsageTold
    ) -> None:
        self._stamp = Stamp.new("chatcmpl", model=model, fingerprint=fingerprint)
        self._n = n
        self._with_logprobs = logprobs
        self._usage = usage
        self._count = UsageCount()

    def whole(self, continuations: Sequence[WholeAnswer]) -> wire.ChatCompletion:
        """The answer that is sent at once."""
        stamp = self._stamp
        return wire.ChatCompletion(
            id=stamp.id,
            created=stamp.created,
            model=stamp.model,
            system_fingerprint=stamp.fingerprint,
            choices=[self._choice(continuation) for continuation in continuations],
            usage=usage_of((0, continuation.finish) for continuation in continuations),
        )

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The role of each choice, its pieces of text, its end, and the usage if asked for."""
        self._count.begin(0, generation.started)
        async with aclosing(generation.events) as events:
            for index in range(self._n):
                yield self._chunk(index, wire.ChatDelta(role="assistant", content=""))
            async for current in events:
                self._count.note(0, current)
                chunk = self._piece(current)
                if chunk is not None:
                    yield chunk
        if self._usage is not UsageTold.NEVER:
            yield event(self._document([], self._count.answer()))

    def _choice(self, continuation: WholeAnswer) -> wire.ChatChoice:
        finish = continuation.finish
        return wire.ChatChoice(
            index=finish.index,
            message=wire.ChatMessage(content=finish.text),
            logprobs=self._logprobs(continuation.pieces),
            finish_reason=FINISH[finish.reason],
        )

    def _piece(self, current: GenerationEvent) -> bytes | None:
        if isinstance(current, Finish):
            delta = wire.ChatDelta(content=current.tail or None)
            return self._chunk(current.index, delta, finish=FINISH[current.reason])
        if not isinstance(current, TokenPiece) or not (current.text or self._with_logprobs):
            return None
        return self._chunk(
            current.index,
            wire.ChatDelta(content=current.text),
            logprobs=self._logprobs([current]),
        )

    def _chunk(
        self,
        index: int,
        delta: wire.ChatDelta,
        *,
        logprobs: wire.ChatLogprobs | None = None,
        finish: wire.FinishName | None = None,
    ) -> bytes:
        choice = wire.ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        told = self._usage is UsageTold.ALWAYS
        return event(self._document([choice], self._count.so_far() if told else None))

    def _document(
        self, choices: list[wire.ChunkChoice], usage: wire.Usage | None
    ) -> wire.ChatChunk:
        stamp = self._stamp
        return wire.ChatChunk(
            id=stamp.id,
            created=stamp.created,
            model=stamp.model,
            system_fingerprint=stamp.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, pieces: Sequence[TokenPiece]) -> wire.ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return wire.ChatLogprobs(content=(_logprob(piece) for piece in pieces))


def _logprob(piece: TokenPiece) -> wire.ChatLogprob:
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
