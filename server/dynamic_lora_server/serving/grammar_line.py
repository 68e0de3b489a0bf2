"""Grammars of requests: those that are compiled at once, the others in a line that has an end."""

import asyncio
from dataclasses import dataclass
from functools import partial

from dynamic_lora_server.engine.sampling.grammars import STACK_BYTES, CompiledGrammar, Grammars
from dynamic_lora_server.generation import Grammar
from dynamic_lora_server.serving.work_pool import WorkPool

# That wait to be compiled, each for what others take: milliseconds, or a large part of a second.
_MAX_WAITING = 64


@dataclass(slots=True, eq=False)
class _Coming:
    """A grammar that is to be compiled, and how many requests wait for it."""

    task: asyncio.Task[CompiledGrammar]
    num_waiting: int = 0


class GrammarLine:
    """Compiles one grammar after the other, on a thread of its own. Lives on one event loop.

    Requests that want the same grammar wait for it together. When all of them have given up
    before its turn, it leaves the line.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._pool = WorkPool(
            "grammars",
            num_threads=1,
            max_waiting=_MAX_WAITING,
            what="grammars",
            stack_bytes=STACK_BYTES,
        )
        self._coming: dict[Grammar, _Coming] = {}

    @property
    def num_waiting(self) -> int:
        """Grammars that wait for the thread."""
        return self._pool.num_waiting

    async def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar for the answers to one request.

        Raises QueueFull where too many wait, and what `Grammars.compile` raises.
        """
        found = self._grammars.known(grammar)
        if found is not None:
            return found
        if not self._grammars.is_shared(grammar):
            return await self._compile(grammar)
        coming = self._coming.get(grammar)
        if coming is None:
            coming = _Coming(asyncio.create_task(self._compile(grammar)))
            self._coming[grammar] = coming
        coming.num_waiting += 1
        try:
            # Who gives up leaves the others waiting.
            return await asyncio.shield(coming.task)
        finally:
            coming.num_waiting -= 1
            if not coming.num_waiting:
                del self._coming[grammar]
                coming.task.cancel()

    async def _compile(self, grammar: Grammar) -> CompiledGrammar:
        return await self._pool.run(partial(self._grammars.compile, grammar))
