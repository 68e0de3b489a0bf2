"""Running generations for a route: beginning, collecting, merging."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dynamic_lora_server.generation import (
    BASE,
    Echo,
    Finish,
    GenerationEvent,
    GenerationSpec,
    Started,
    TokenPiece,
)
from dynamic_lora_server.http.access_log import note_adapter

A = TypeVar("A")
T = TypeVar("T")
Events = AsyncGenerator[GenerationEvent, None]


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation that was admitted; `events` are those after Started and must be closed."""

    started: Started
    events: Events


@dataclass(frozen=True, slots=True)
class Prepared(Generic[A]):
    """What a request asks for and what writes its answer, made for one `version` of its adapter."""

    spec: GenerationSpec
    answer: A
    version: str | None  # None: the base model


@dataclass(slots=True)
class WholeAnswer:
    """One of the n answers to a request, from its first token to its end."""

    finish: Finish
    pieces: list[TokenPiece] = field(default_factory=list)
    echo: Echo | None = None

    @property
    def prompt(self) -> str:
        """The text of the prompt, if it is given back."""
        return "" if self.echo is None else self.echo.text

    @property
    def prompt_pieces(self) -> Iterable[TokenPiece]:
        """The prompt's tokens, if they are given back with their log-probabilities."""
        return () if self.echo is None else self.echo.pieces


async def begin(events: Events) -> Generation:
    """Wait until a generation is admitted; raises what refuses it."""
    started = await anext(events)
    assert isinstance(started, Started)
    note_adapter(started.adapter or BASE)
    return Generation(started, events)


async def begin_prepared(
    prepare: Callable[[], Awaitable[Prepared[A]]], generate: Callable[[GenerationSpec], Events]
) -> tuple[Generation, A]:
    """Begin; start over if the adapter was replaced after its prompt was rendered."""
    while True:
        prepared = await prepare()
        generation = await begin(generate(prepared.spec))
        if generation.started.version == prepared.version:
            return generation, prepared.answer
        await generation.events.aclose()


async def begin_all(streams: Sequence[Events]) -> list[Generation]:
    """Begin several generations; if one is refused, those that began are closed."""
    begun: list[Generation] = []
    try:
        for stream in streams:
            begun.append(await begin(stream))
    except BaseException:
        await close_all(streams)
        raise
    return begun


async def close_all(streams: Sequence[Events]) -> None:
    """Close generations, which frees their places at once; closing twice is harmless."""
    for stream in streams:
        await stream.aclose()


async def collect(generation: Generation) -> list[WholeAnswer]:
    """Run a generation to its end; its answers by index."""
    pieces: dict[int, list[TokenPiece]] = {}
    echoes: dict[int, Echo] = {}
    done: dict[int, WholeAnswer] = {}
    async with aclosing(generation.events):
        async for event in generation.events:
            if isinstance(event, TokenPiece):
                pieces.setdefault(event.index, []).append(event)
            elif isinstance(event, Echo):
                echoes[event.index] = event
            elif isinstance(event, Finish):
                index = event.index
                done[index] = WholeAnswer(event, pieces.get(index, []), echoes.get(index))
    return [done[index] for index in sorted(done)]


async def collect_all(generations: Sequence[Generation]) -> list[list[WholeAnswer]]:
    """Run several generations side by side to their ends; all are closed if one fails."""
    tasks = [asyncio.ensure_future(collect(generation)) for generation in generations]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merge(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """The events of several generators as they come, each with its generator's position."""
    waiting = {asyncio.ensure_future(_next(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                position = waiting.pop(task)
                event = task.result()
                if event is not None:
                    waiting[asyncio.ensure_future(_next(streams[position]))] = position
                    yield position, event
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> T | None:
    return await anext(stream, None)
