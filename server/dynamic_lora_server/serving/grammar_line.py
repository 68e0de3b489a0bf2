"""Grammars of requests: those that are compiled at once, the others in a line that has an end."""

import asyncio
from functools import partial

from dynamic_lora_server.engine.sampling.grammars import STACK_BYTES, CompiledGrammar, Grammars
from dynamic_lora_server.generation import Grammar
from dynamic_lora_server.serving.work_pool import WorkPool

# That wait to be compiled, each for what others take: milliseconds, or a large part of a second.
_MAX_WAITING = 64


class GrammarLine:
    """Compiles one grammar after the other, on a thread of its own. Lives on one event loop.

    Requests that want the same grammar wait for it together.
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
        self._coming: dict[Grammar, asyncio.Task[CompiledGrammar]] = {}

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
        task = self._coming.get(grammar)
        if task is None:
            task = asyncio.create_task(self._compile(grammar))
            self._coming[grammar] = task
            task.add_done_callback(lambda _: self._coming.pop(grammar))
        # Who gives up leaves the others waiting.
        return await asyncio.shield(task)

    async def _compile(self, grammar: Grammar) -> CompiledGrammar:
        return await self._pool.run(partial(self._grammars.compile, grammar))
