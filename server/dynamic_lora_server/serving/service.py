"""Generations for the HTTP layer: admission, adapter, engine, text."""

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial

from dynamic_lora_server.engine.engine import Engine, EngineEvent, FailedEvent, PromptEvent
from dynamic_lora_server.engine.sampling.grammars import CompiledGrammar, Grammars
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.worker import Cancel, MakeRoom, Submit, Worker
from dynamic_lora_server.errors import (
    EngineFailed,
    GrammarFailed,
    NotReady,
    ServerError,
)
from dynamic_lora_server.generation import (
    Finish,
    GenerationEvent,
    GenerationSpec,
    Started,
)
from dynamic_lora_server.recorder import Arrival, TraceRecorder
from dynamic_lora_server.serving.adapter_loader import AdapterLoader, Held
from dynamic_lora_server.serving.admission import Admission, ServiceLimits
from dynamic_lora_server.serving.continuation import Continuation
from dynamic_lora_server.serving.demand import Demand
from dynamic_lora_server.serving.grammar_line import GrammarLine
from dynamic_lora_server.serving.places import Places
from dynamic_lora_server.text import Detokenizer, TokenizerView

_SEED_SPACE = 2**64


class GenerationService:
    """Runs generations on an engine thread of its own. Lives on one event loop."""

    def __init__(
        self,
        engine: Engine,
        loader: AdapterLoader,
        view: TokenizerView,
        limits: ServiceLimits,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self.places = Places(limits.max_running, limits.max_waiting)
        self._loader = loader
        self._recorder = recorder
        self._view = view
        self._limits = limits
        self._admission = Admission(view, limits)
        self._grammars = GrammarLine(Grammars(view, limits.eos_ids))
        self._ids = itertools.count()
        self._inboxes: dict[int, asyncio.Queue[EngineEvent]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken = asyncio.Event()
        self._ending: NotReady | None = None
        self._worker = Worker(engine, self._receive, self._on_broken)
        loader.make_room = self._make_room

    def start(self) -> None:
        """Start the engine thread; call it on the event loop that will serve."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    def refuse(self) -> None:
        """Begin no more generations, not even of waiting requests. Call it on the event loop."""
        self._ending = NotReady("The server is shutting down.", fix="Send the request again.")
        self._loader.fail_waiters(self._ending)

    def close(self) -> None:
        """Refuse, fail what runs and end the engine thread.

        `refuse` must have been called before where this runs off the event loop.
        """
        if self._ending is None:
            self.refuse()
        self._worker.stop()
        if self._recorder is not None:
            self._recorder.close()

    def check_alive(self) -> None:
        """Raise NotReady unless the step loop runs."""
        if self._ending is not None:
            raise self._ending
        if self._loop is None or not self._worker.alive:
            why = self._worker.failure or "the engine is not running"
            raise NotReady(f"{why[0].upper()}{why[1:]}.", fix="See the server's log.")

    async def until_broken(self) -> EngineFailed:
        """Wait until the step loop breaks, for which there is no remedy; the reason."""
        await self._broken.wait()
        return EngineFailed(f"{self._worker.failure}.", fix="Start the server again.")

    def demand(self) -> Demand:
        """Who waits for what, at this moment. Any thread may ask."""
        line = self._loader.line
        return Demand(
            num_open=self.places.num_open,
            capacity=self.places.capacity,
            num_held_up=self.places.num_held_up,
            num_in_line=line.num_waiting,
            first_waited_s=line.waited_s,
            queues={
                "encode": self._admission.num_waiting,
                "grammar": self._grammars.num_waiting,
                **self._loader.readers.queues(),
            },
        )

    async def stream(self, spec: GenerationSpec) -> AsyncGenerator[GenerationEvent, None]:
        """Run a generation: one Started, then TokenPieces, one Finish per continuation.

        Where the prompt is to be given back, an Echo comes before the first piece of each.

        Closing the iterator ends the generation at once and frees its place. The adapter's slot
        is free once the engine is done, also where nobody reads what it made.
        Raises an AdapterError (not found, no composition, no room), ContextOverflow,
        InvalidParameter, QueueFull or NotReady before Started, EngineFailed at any time.
        """
        self.check_alive()
        arrived_s = 0.0 if self._recorder is None else self._recorder.now()
        async with AsyncExitStack() as stack:
            stack.enter_context(self.places.taken(spec.n))
            prompt_ids = await self._admission.prompt_ids(spec)
            echoed = await self._admission.prompt_text(spec)
            asked = spec.grammar
            grammar = None if asked is None else await self._grammars.compiled(asked)
            async with AsyncExitStack() as until_submitted:
                held = None
                if spec.adapter is not None:
                    waiting = partial(self.places.held_up, spec.n)
                    hold = self._loader.hold(spec.adapter, waiting)
                    held = await until_submitted.enter_async_context(hold)
                if asked is not None and grammar is not None and grammar.has_failed:
                    # Another answer broke it, while this one waited for its adapter.
                    grammar = await self._grammars.compiled(asked)
                continuations = self._continuations(spec, prompt_ids, echoed, held, grammar)
                self._clip_to_context(spec, continuations.values())
                started = _started(held, len(prompt_ids))
                self.check_alive()  # it may have waited long
                # From here on each sequence has a lease of its own. One that nobody drives would
                # be kept for ever by a request that waits for room for its next prompt.
                inbox = stack.enter_context(self._submitted(continuations))
            yield started
            async for event in self._events(inbox, continuations):
                if isinstance(event, Finish):
                    self._record(started, event, arrived_s)
                yield event

    def _clip_to_context(self, spec: GenerationSpec, found: Iterable[Continuation]) -> None:
        """Refit, now that the adapter's virtual tokens are known."""
        for continuation in found:
            sequence = continuation.sequence
            sequence.sampling = self._admission.fitted(
                spec, sequence.num_prompt, sequence.num_virtual
            )

    def _continuations(
        self,
        spec: GenerationSpec,
        prompt_ids: tuple[int, ...],
        echoed: str | None,
        held: Held | None,
        grammar: CompiledGrammar | None,
    ) -> dict[int, Continuation]:
        seed = spec.sampling.seed
        first_seed = secrets.randbits(64) if seed is None else seed
        stop_ids = self._stop_ids(held)
        stops = spec.sampling.stop_token_ids
        shown = self._view.known_ids(spec.shown_tokens, ())
        continuations = {}
        for index in range(spec.n):
            sequence = Sequence(
                id=next(self._ids),
                prompt_ids=prompt_ids,
                sampling=spec.sampling,
                stop_ids=stop_ids,
                seed=(first_seed + index) % _SEED_SPACE,
                adapter=None if held is None else held.adapter,
                guide=None if grammar is None else grammar.guide(ends=stop_ids, stops=stops),
            )
            detokenizer = Detokenizer(
                self._view, stop=spec.stop, include_stop=spec.include_stop, shown=shown
            )
            continuations[sequence.id] = Continuation(
                index, sequence, self._view, detokenizer, echoed
            )
        return continuations

    def _stop_ids(self, held: Held | None) -> frozenset[int]:
        """What ends an answer: the base's end tokens, and an adapter's that the base knows."""
        if held is None or held.chat is None:
            return self._limits.eos_ids
        return self._limits.eos_ids | self._view.known_ids(held.chat.end_tokens, held.chat.end_ids)

    @contextmanager
    def _submitted(
        self, continuations: dict[int, Continuation]
    ) -> Iterator[asyncio.Queue[EngineEvent]]:
        """The continuations' events; what still runs when the block ends is cancelled."""
        inbox: asyncio.Queue[EngineEvent] = asyncio.Queue()
        for sequence_id, continuation in continuations.items():
            self._inboxes[sequence_id] = inbox
            self._submit(continuation.sequence)
        try:
            yield inbox
        finally:
            for sequence_id, continuation in continuations.items():
                self._inboxes.pop(sequence_id, None)
                if not continuation.done:
                    self._worker.send(Cancel(continuation.sequence))

    def _submit(self, sequence: Sequence) -> None:
        if sequence.adapter is None:
            self._worker.send(Submit(sequence))
        else:
            self._worker.send(Submit(sequence, self._loader.share(sequence.adapter)))

    async def _events(
        self, inbox: "asyncio.Queue[EngineEvent]", continuations: dict[int, Continuation]
    ) -> AsyncIterator[GenerationEvent]:
        remaining = len(continuations)
        while remaining:
            event = await inbox.get()
            continuation = continuations[event.sequence_id]
            if continuation.done:
                continue  # tokens made between a stop string and its cancellation
            if isinstance(event, FailedEvent):
                continuation.done = True
                raise self._ending or _failure(event)
            if isinstance(event, PromptEvent):
                continuation.hear_prompt(event)
                continue
            if (echo := continuation.echo()) is not None:
                yield echo
            piece = continuation.piece(event)
            finish = continuation.finish(event)
            if finish is not None and event.reason is None:
                self._worker.send(Cancel(continuation.sequence))
            yield piece if finish is None else replace(piece, is_last=True)
            if finish is not None:
                remaining -= 1
                yield finish

    def _record(self, started: Started, finish: Finish, arrived_s: float) -> None:
        if self._recorder is None:
            return
        arrival = Arrival(
            arrival_s=round(arrived_s, 6),
            adapter=started.adapter,
            num_prompt_tokens=finish.num_prompt_tokens,
            num_output_tokens=finish.num_output_tokens,
        )
        self._recorder.record(arrival)

    def _make_room(self, doomed_only: bool, done: Callable[[], object]) -> None:
        """Have the engine unmerge; `done` is called on its thread if it did, or just has."""
        self._worker.send(MakeRoom(doomed_only, done))

    def _on_broken(self) -> None:
        """Called on the engine thread."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        self._broken.set()
        assert self._worker.failure is not None
        self._loader.fail_waiters(EngineFailed(f"{self._worker.failure}."))

    def _receive(self, events: list[EngineEvent]) -> None:
        """Called on the engine thread with the events of a step."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[EngineEvent]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.sequence_id)
            if inbox is not None:
                inbox.put_nowait(event)


def _failure(event: FailedEvent) -> ServerError:
    if event.by_grammar:
        return GrammarFailed(
            f"The grammar could be followed no further: {event.message}.",
            fix="Send the request again, simplify the grammar, or allow shorter answers.",
        )
    return EngineFailed(event.message)


def _started(held: Held | None, num_prompt_tokens: int) -> Started:
    if held is None:
        return Started(adapter=None, version=None, num_prompt_tokens=num_prompt_tokens)
    plain = held.composition.plain
    return Started(
        adapter=str(held.composition),
        version=held.version,
        num_prompt_tokens=num_prompt_tokens,
        name=None if plain is None else plain.name,
    )
