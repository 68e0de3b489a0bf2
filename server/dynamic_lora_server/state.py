"""What one application shares between its requests, and how it comes up and goes down."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.errors import NotReady
from dynamic_lora_server.generation import GenerationEvent, GenerationSpec
from dynamic_lora_server.intake.hub_adapters import HubAdapters
from dynamic_lora_server.intake.hub_room import make_room
from dynamic_lora_server.intake.publishing import publish_source
from dynamic_lora_server.intake.sources import HUB_SCHEME
from dynamic_lora_server.metrics import EngineCollector, Metrics, Reading
from dynamic_lora_server.readings import readings_of, readings_of_demand
from dynamic_lora_server.schemas.adapters import AdapterSource
from dynamic_lora_server.serving.work_pool import WorkPool

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

T = TypeVar("T")
Load = Callable[[], "Runtime"]

_NUM_PARSING = 2
_NUM_RENDERING = 2
_NUM_TOKENIZING = 2
_NUM_WRITING = 2
_LARGE_BODY = 2**18  # bytes; smaller ones are parsed within milliseconds
_MAX_TO_TOKENIZE = 64  # that wait, each with a body of up to `max_body_bytes`


class ServerState:
    """Configuration, metrics and, once it is loaded, the runtime."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.started_at = time.time()
        self.metrics = Metrics(knows=self._knows)
        self.metrics.registry.register(EngineCollector(self._readings, self._resident))
        capacity = config.max_running + config.max_waiting
        self.hub = HubAdapters(config.fetch_from_hub, self._publish_from_hub, max_waiting=capacity)
        self._making_room = asyncio.Lock()
        # As much as waits here is bounded by `BodyLimit`.
        self._parsing = WorkPool("parse", num_threads=_NUM_PARSING, max_waiting=None)
        self._rendering = WorkPool("render", num_threads=_NUM_RENDERING, max_waiting=capacity)
        self._tokenizing = WorkPool(
            "tokenize", num_threads=_NUM_TOKENIZING, max_waiting=_MAX_TO_TOKENIZE
        )
        # What waits here was generated already, so that refusing it would save nothing.
        self._writing = WorkPool("write", num_threads=_NUM_WRITING, max_waiting=None)
        self._runtime: Runtime | None = None
        self._why_not = "The model is still loading."

    @property
    def runtime(self) -> "Runtime":
        """The loaded runtime. Raises NotReady before and after, saying why."""
        if self._runtime is None:
            raise NotReady(self._why_not, fix="GET /ready answers 200 when the server is ready.")
        return self._runtime

    def generate(self, spec: GenerationSpec) -> AsyncGenerator[GenerationEvent, None]:
        """Start a generation, seen by the metrics. The generator must be closed."""
        events = self.runtime.service.stream(spec)
        return self.metrics.observed(events)

    def is_large(self, body: bytes) -> bool:
        """Whether it takes long to parse and check a body, so that `parse` is to do it."""
        return len(body) > _LARGE_BODY

    async def parse(self, work: Callable[[], T]) -> T:
        """Run `work`, which parses and checks a large body, on one of a few threads."""
        return await self._parsing.run(work)

    async def render(self, work: Callable[[], T]) -> T:
        """Run `work`, which renders a conversation, on one of a few threads.

        A long one would hold up everybody's streams. Raises QueueFull where too many wait.
        """
        return await self._rendering.run(work)

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run `work`, which tokenises for who wants the tokens alone, on one of a few threads.

        A long text takes seconds and some hundred times its size: not many at a time, and no
        generation's prompt is to wait for it. Raises QueueFull where too many wait.
        """
        return await self._tokenizing.run(work)

    async def write(self, work: Callable[[], T]) -> T:
        """Run `work`, which writes an answer with the log-probabilities of all its tokens, on one
        of a few threads.

        A long one would hold up everybody's streams for seconds.
        """
        return await self._writing.run(work)

    async def come_up(self, load: Load) -> None:
        """Load the runtime on a thread of its own, and start it on this event loop.

        A failure is remembered for `/ready` and raised. Cancelling leaves the
        thread to end with the process: a load cannot be interrupted.
        """
        try:
            runtime = await _on_daemon_thread(load)
        except Exception as error:
            self._why_not = f"The model could not be loaded: {error}"
            raise
        runtime.start()
        self._runtime = runtime

    async def end_generations(self) -> None:
        """Refuse new ones and fail those that run, so that their answers end; all else goes on."""
        if self._runtime is not None:
            self._runtime.service.refuse()
            self.hub.give_up()
            await asyncio.to_thread(self._runtime.service.close)

    async def go_down(self) -> None:
        """Refuse new requests, then fail those that run and free the model."""
        runtime, self._runtime = self._runtime, None
        self._why_not = "The server is shutting down."
        if runtime is not None:
            runtime.service.refuse()
            self.hub.give_up()
            await asyncio.to_thread(runtime.close)

    async def _publish_from_hub(self, name: str) -> None:
        await self._make_hub_room()  # before anything is fetched in vain
        source = AdapterSource(name=name, source=f"{HUB_SCHEME}{name}")
        published = await publish_source(self.runtime, source, replace=False, fetched=True)
        if published.created:  # else somebody uploaded one meanwhile
            await self._make_hub_room(newest=published.passport)

    async def _make_hub_room(self, *, newest: Passport | None = None) -> None:
        max_bytes, runtime = self.config.max_hub_bytes, self.runtime
        if max_bytes is None:
            return
        make = partial(make_room, runtime.registry, runtime.saved, max_bytes, newest=newest)
        async with self._making_room:
            gone = await asyncio.to_thread(make)
        for name in gone:
            self.metrics.forget(name)

    def _readings(self) -> list[Reading]:
        if self._runtime is None:
            return []
        queues = {
            "parse": self._parsing.num_waiting,
            "render": self._rendering.num_waiting,
            "tokenize": self._tokenizing.num_waiting,
            "write": self._writing.num_waiting,
            "hub": self.hub.num_waiting,
        }
        demand = self._runtime.service.demand()
        return [*readings_of(self._runtime.stats()), *readings_of_demand(demand, queues)]

    def _knows(self, adapter: str) -> bool:
        return self._runtime is not None and self._runtime.registry.has(adapter)

    def _resident(self) -> Mapping[str, bool]:
        if self._runtime is None:
            return {}
        passports = self._runtime.registry.list()
        return {p.name: self._runtime.tier(p.version) == "device" for p in passports}


async def _on_daemon_thread(load: Load) -> "Runtime":
    """As `asyncio.to_thread`, but a process that ends does not wait for the thread."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Runtime] = loop.create_future()

    def settle(runtime: "Runtime | None", error: BaseException | None) -> None:
        if outcome.cancelled():
            if runtime is not None:
                runtime.registry.close()
        elif error is not None:
            outcome.set_exception(error)
        elif runtime is not None:
            outcome.set_result(runtime)

    def run() -> None:
        runtime, failure = None, None
        try:
            runtime = load()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, runtime, failure)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await outcome
