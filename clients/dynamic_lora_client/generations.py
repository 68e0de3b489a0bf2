"""Generations, read from the server's answers and streams."""

from collections.abc import Iterator, Sequence

import httpx

from dynamic_lora_client.documents import Document
from dynamic_lora_client.errors import InvalidResponse, StreamBroken
from dynamic_lora_client.sse import SseDecoder
from dynamic_lora_client.types import Continuation, Generation, Token


def read_generation(response: httpx.Response) -> Generation:
    """The answer of `POST /generate`. Raises InvalidResponse."""
    document = Document.parse(response.content)
    details = document.child("details")
    tokens = () if details is None else _tokens(details)
    return _generation(document.text("generated_text"), response.headers, details, tokens)


class GenerationStream:
    """Reads the events of a streamed answer.

    Raises StreamBroken where the server reports an error in the stream, and
    from `close` where no last event came.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._headers = response.headers
        self._decoder = SseDecoder()
        self._tokens: list[Token] = []
        self._finished = False

    def feed(self, chunk: bytes) -> Iterator[Token | Generation]:
        """The events that `chunk` completes."""
        for data in self._decoder.feed(chunk):
            yield from self._event(Document.parse(data))

    def close(self) -> None:
        """Check, when the body has ended, that the generation has too."""
        if not self._finished:
            raise StreamBroken("The stream ended before the generation did.")

    def _event(self, event: Document) -> Iterator[Token | Generation]:
        if "error" in event.values:
            raise StreamBroken(event.text("error"), error_type=event.optional_text("error_type"))
        token = event.child("token")
        if token is not None:
            self._tokens.append(_token(token, event.children("top_tokens")))
            yield self._tokens[-1]
        text = event.optional_text("generated_text")
        if text is not None:
            self._finished = True
            details = event.child("details")
            yield _generation(text, self._headers, details, tuple(self._tokens))


def _generation(
    text: str, headers: httpx.Headers, details: Document | None, tokens: tuple[Token, ...]
) -> Generation:
    served_by = {
        "adapter": headers.get("x-adapter"),
        "adapter_version": headers.get("x-adapter-version"),
    }
    if details is None:
        return Generation(text=text, tokens=tokens, **served_by)
    return Generation(
        text=text,
        tokens=tokens,
        finish_reason=details.text("finish_reason"),
        num_prompt_tokens=details.optional_integer("prompt_tokens"),
        num_cached_tokens=details.optional_integer("cached_tokens"),
        num_tokens=details.integer("generated_tokens"),
        seed=details.optional_integer("seed"),
        mode=details.optional_text("mode"),
        others=tuple(_continuation(one) for one in details.children("best_of_sequences")),
        **served_by,
    )


def _continuation(sequence: Document) -> Continuation:
    return Continuation(
        text=sequence.text("generated_text"),
        finish_reason=sequence.text("finish_reason"),
        num_tokens=sequence.integer("generated_tokens"),
        seed=sequence.optional_integer("seed"),
        tokens=_tokens(sequence),
    )


def _tokens(sequence: Document) -> tuple[Token, ...]:
    tokens = sequence.children("tokens")
    likely = sequence.child_lists("top_tokens") or [[]] * len(tokens)
    if len(likely) != len(tokens):
        raise InvalidResponse("The server's answer has 'top_tokens' of other positions.")
    return tuple(_token(token, top) for token, top in zip(tokens, likely, strict=True))


def _token(token: Document, top: Sequence[Document] = ()) -> Token:
    return Token(
        id=token.integer("id"),
        text=token.text("text"),
        logprob=token.optional_number("logprob"),
        special=token.boolean("special"),
        top_tokens=tuple(_token(one) for one in top),
    )
