"""Collecting, merging and looking ahead; everything is closed in every case."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from dynamic_lora_server.answers.streams import begin_all, collect, collect_all, merge
from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.generation import (
    Finish,
    FinishReason,
    GenerationEvent,
    ServedMode,
    Started,
    TokenPiece,
)

STARTED = Started(adapter=None, version=None, num_prompt_tokens=2)


def piece(text: str, index: int = 0) -> TokenPiece:
    return TokenPiece(
        index=index, token_id=5, text=text, token_bytes=text.encode(), offset=0, special=False
    )


def finish(text: str, index: int = 0) -> Finish:
    return Finish(
        index=index,
        reason=FinishReason.LENGTH,
        text=text,
        tail="",
        num_prompt_tokens=2,
        num_output_tokens=len(text),
        seed=None,
        mode=ServedMode.BASE,
    )


class Script:
    """A generation that plays events; an exception among them is raised, None waits for ever."""

    def __init__(self, *events: GenerationEvent | Exception | None) -> None:
        self._events = events
        self.closed = False

    async def play(self) -> AsyncGenerator[GenerationEvent, None]:
        try:
            for event in self._events:
                if event is None:
                    await asyncio.Event().wait()
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
        finally:
            self.closed = True


async def test_collect_sorts_interleaved_continuations() -> None:
    script = Script(
        STARTED,
        piece("b", 1),
        piece("a", 0),
        piece("d", 1),
        finish("bd", 1),
        piece("c", 0),
        finish("ac", 0),
    )
    (generation,) = await begin_all([script.play()])
    first, second = await collect(generation)
    assert (first.finish.text, second.finish.text) == ("ac", "bd")
    assert [p.text for p in second.pieces] == ["b", "d"]
    assert script.closed


async def test_if_one_is_refused_those_that_began_are_closed() -> None:
    first, second = Script(STARTED, None), Script(QueueFull("full", retry_after=1))
    with pytest.raises(QueueFull):
        await begin_all([first.play(), second.play()])
    assert first.closed


async def test_if_one_fails_the_others_are_closed() -> None:
    waiting = Script(STARTED, None)
    failing = Script(STARTED, piece("a"), ValueError("broken"))
    generations = await begin_all([waiting.play(), failing.play()])
    with pytest.raises(ValueError, match="broken"):
        await collect_all(generations)
    assert waiting.closed


async def test_merge_gives_everything_with_its_place() -> None:
    scripts = [Script(piece("a"), piece("b")), Script(piece("c"))]
    seen = [item async for item in merge([script.play() for script in scripts])]
    assert sorted(
        (place, event.text) for place, event in seen if isinstance(event, TokenPiece)
    ) == [
        (0, "a"),
        (0, "b"),
        (1, "c"),
    ]


async def test_closing_a_merge_closes_all() -> None:
    scripts = [Script(piece("a"), None), Script(None)]
    merged = merge([script.play() for script in scripts])
    assert (await anext(merged))[0] == 0
    await merged.aclose()
    assert all(script.closed for script in scripts)
