"""Events of a generation, as the service gives them to what writes answers."""

from collections.abc import AsyncGenerator

from dynamic_lora_server.answers.streams import Generation
from dynamic_lora_server.generation import (
    Finish,
    FinishReason,
    GenerationEvent,
    ServedMode,
    Started,
    TokenLogprob,
    TokenPiece,
)

_STARTED = Started(adapter=None, version=None, num_prompt_tokens=3)
_TOP = (TokenLogprob(token_id=8, token_bytes=b" a", logprob=-0.5),)


def piece(
    text: str,
    *,
    token: str | bytes = "",
    offset: int = 0,
    special: bool = False,
    index: int = 0,
    top: tuple[TokenLogprob, ...] = _TOP,
    is_last: bool = False,
) -> TokenPiece:
    """A token that adds a text, and is that text unless it is told otherwise."""
    token = token or text
    return TokenPiece(
        index=index,
        token_id=9,
        text=text,
        token_bytes=token if isinstance(token, bytes) else token.encode(),
        offset=offset,
        special=special,
        logprob=-1.0,
        top=top,
        is_last=is_last,
    )


def finish(reason: FinishReason, text: str, *, tail: str = "", index: int = 0) -> Finish:
    """The end of a continuation of a whole text."""
    return Finish(
        index=index,
        reason=reason,
        text=text,
        tail=tail,
        num_prompt_tokens=3,
        num_output_tokens=2,
        num_cached_tokens=2 + index,  # a second continuation finds what the first computed
        seed=11,
        mode=ServedMode.BASE,
    )


def generation(*events: GenerationEvent | Exception) -> Generation:
    """One that was admitted, with these events; an error is raised where it stands."""

    async def play() -> AsyncGenerator[GenerationEvent, None]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    return Generation(_STARTED, play())
