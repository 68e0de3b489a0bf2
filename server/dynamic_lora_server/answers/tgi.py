"""Generation events as `/generate` answers them, in TGI's shapes."""

from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import aclosing

from dynamic_lora_server.answers.streams import Generation, WholeAnswer
from dynamic_lora_server.generation import Finish, FinishReason, TokenPiece
from dynamic_lora_server.http.problems import problem, stream_fault
from dynamic_lora_server.http.sse import event, json_event
from dynamic_lora_server.schemas import generate as wire

_FINISH: dict[FinishReason, wire.FinishName] = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
}


class TgiAnswer:
    """Writes the answers to one request.

    `prefix` is put before every continuation (the prompt, for
    `return_full_text`); `num_top` asks for that many likely tokens a position.
    """

    def __init__(self, *, prefix: str, num_top: int, special_ids: Collection[int]) -> None:
        self._prefix = prefix
        self._num_top = num_top
        self._special_ids = frozenset(special_ids)

    def whole(
        self, continuations: Sequence[WholeAnswer], *, details: bool
    ) -> wire.GenerateResponse:
        """The answer of `/generate`; continuations after the first go into `details`."""
        first, *others = continuations
        return wire.GenerateResponse(
            generated_text=self._prefix + first.finish.text,
            details=self._details(first, others) if details else None,
        )

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """One event for each token; a failure is the last event."""
        index = 0
        async with aclosing(generation.events) as events:
            try:
                async for piece in events:
                    assert isinstance(piece, TokenPiece)
                    index += 1
                    finish = await anext(events) if piece.is_last else None
                    assert finish is None or isinstance(finish, Finish)
                    yield event(self._event(index, piece, finish))
            except Exception as error:
                yield json_event(problem(stream_fault(error)))

    def _details(self, first: WholeAnswer, others: Sequence[WholeAnswer]) -> wire.Details:
        return wire.Details(
            finish_reason=_FINISH[first.finish.reason],
            generated_tokens=first.finish.num_output_tokens,
            prompt_tokens=first.finish.num_prompt_tokens,
            cached_tokens=first.finish.num_cached_tokens,
            seed=first.finish.seed,
            mode=first.finish.mode,
            prefill=[],
            tokens=_tokens(first.pieces),
            top_tokens=self._top_tokens(first.pieces),
            best_of_sequences=[self._sequence(other) for other in others] or None,
        )

    def _sequence(self, continuation: WholeAnswer) -> wire.Sequence:
        finish = continuation.finish
        return wire.Sequence(
            generated_text=self._prefix + finish.text,
            finish_reason=_FINISH[finish.reason],
            generated_tokens=finish.num_output_tokens,
            seed=finish.seed,
            prefill=[],
            tokens=_tokens(continuation.pieces),
            top_tokens=self._top_tokens(continuation.pieces),
        )

    def _event(self, index: int, piece: TokenPiece, finish: Finish | None) -> wire.StreamEvent:
        text = piece.text if finish is None else piece.text + finish.tail
        return wire.StreamEvent(
            index=index,
            # TGI's clients drop the text of a special token, and this may be other tokens' text.
            token=_token(piece, text, special=piece.special and not text),
            top_tokens=self._top(piece) if self._num_top else None,
            generated_text=None if finish is None else self._prefix + finish.text,
            details=None if finish is None else _stream_details(finish),
        )

    def _top_tokens(self, pieces: Sequence[TokenPiece]) -> Iterator[list[wire.Token]] | None:
        return (self._top(piece) for piece in pieces) if self._num_top else None

    def _top(self, piece: TokenPiece) -> list[wire.Token]:
        return [
            wire.Token(
                id=token.token_id,
                text=token.text,
                logprob=token.logprob,
                special=token.token_id in self._special_ids,
            )
            for token in piece.top
        ]


def _tokens(pieces: Sequence[TokenPiece]) -> Iterator[wire.Token]:
    return (_token(piece, piece.token_text, special=piece.special) for piece in pieces)


def _token(piece: TokenPiece, text: str, *, special: bool) -> wire.Token:
    return wire.Token(id=piece.token_id, text=text, logprob=piece.logprob, special=special)


def _stream_details(finish: Finish) -> wire.StreamDetails:
    return wire.StreamDetails(
        finish_reason=_FINISH[finish.reason],
        generated_tokens=finish.num_output_tokens,
        prompt_tokens=finish.num_prompt_tokens,
        input_length=finish.num_prompt_tokens,
        cached_tokens=finish.num_cached_tokens,
        seed=finish.seed,
        mode=finish.mode,
    )
