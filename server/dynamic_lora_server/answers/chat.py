"""Generation events as `/v1/chat/completions` answers them."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from dynamic_lora_server.answers.calls import delta_of, finish_name, first_delta, whole_message
from dynamic_lora_server.answers.openai import (
    FINISH,
    Stamp,
    UsageCount,
    UsageTold,
    logprob_of,
    usage_of,
)
from dynamic_lora_server.answers.streams import Generation, WholeAnswer
from dynamic_lora_server.generation import Finish, GenerationEvent, TokenPiece
from dynamic_lora_server.http.sse import event
from dynamic_lora_server.schemas import openai_answers as wire
from dynamic_lora_server.tools.calls import Reader
from dynamic_lora_server.tools.offer import Offer


class ChatAnswer:
    """Writes the answers to one request."""

    def __init__(
        self,
        *,
        model: str,
        fingerprint: str,
        n: int,
        logprobs: bool,
        usage: UsageTold,
        offer: Offer | None = None,
    ) -> None:
        self._stamp = Stamp.new("chatcmpl", model=model, fingerprint=fingerprint)
        self._n = n
        self._with_logprobs = logprobs
        self._usage = usage
        self._count = UsageCount()
        self._offer = offer
        self._told: set[int] = set()  # choices with tools that have words or calls

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
        """The role of each choice, its pieces of text and calls, its end, and the usage if asked
        for."""
        readers = [] if self._offer is None else [self._offer.reader() for _ in range(self._n)]
        self._count.begin(0, generation.started)
        async with aclosing(generation.events) as events:
            for index in range(self._n):
                yield self._chunk(index, first_delta(self._offer))
            async for current in events:
                self._count.note(0, current)
                if readers and isinstance(current, TokenPiece | Finish):
                    for part in self._with_calls(current, readers[current.index]):
                        yield part
                elif (chunk := self._piece(current)) is not None:
                    yield chunk
        if self._usage is not UsageTold.NEVER:
            yield event(self._document([], self._count.answer()))

    def _choice(self, continuation: WholeAnswer) -> wire.ChatChoice:
        finish = continuation.finish
        message, called = wire.ChatMessage(content=finish.text), False
        if self._offer is not None:
            message, called = whole_message(finish.text, self._offer.reader())
        return wire.ChatChoice(
            index=finish.index,
            message=message,
            logprobs=self._logprobs(continuation.pieces),
            finish_reason=finish_name(finish.reason, called=called),
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

    def _with_calls(self, current: TokenPiece | Finish, reader: Reader) -> Iterator[bytes]:
        """Chunks of one delta each; clients add up the deltas of a call one by one."""
        if isinstance(current, Finish):
            rest = [delta_of(part) for part in [*reader.push(current.tail), *reader.finish()]]
            if not rest and current.index not in self._told:
                rest = [wire.ChatDelta(content="")]  # as the whole answer has it
            for delta in rest:
                yield self._chunk(current.index, delta)
            end = finish_name(current.reason, called=reader.called)
            yield self._chunk(current.index, wire.ChatDelta(), finish=end)
            return
        deltas = [delta_of(part) for part in reader.push(current.text)]
        if deltas:
            self._told.add(current.index)
        if self._with_logprobs and not deltas:
            deltas = [wire.ChatDelta()]
        for number, delta in enumerate(deltas):
            logprobs = None if number else self._logprobs([current])
            yield self._chunk(current.index, delta, logprobs=logprobs)

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
        return wire.ChatLogprobs(content=(logprob_of(piece) for piece in pieces))
