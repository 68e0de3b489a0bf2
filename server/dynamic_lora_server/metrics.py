"""What Prometheus may read: requests, tokens and latencies, and the engine's state.

Each application has its own registry, so that several can live in one process.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import groupby

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamic_lora_adapters.names import SUMS
from dynamic_lora_server.errors import EngineFailed, GrammarFailed, NotReady
from dynamic_lora_server.generation import BASE, Finish, GenerationEvent, Started, TokenPiece

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_CLOSED = (GeneratorExit, asyncio.CancelledError)  # by its client, or with a part that failed
# Why generations do not come to their end. The first that an error is counts.
_CAUSES: Mapping[type[BaseException] | tuple[type[BaseException], ...], str] = {
    _CLOSED: "client",
    GrammarFailed: "grammar",
    NotReady: "stop",
    EngineFailed: "step",
    Exception: "other",
}


class Metrics:
    """The counters and histograms of one application; `clock` is in seconds.

    `knows` tells whether there is an adapter of a name. What a request of a deleted one still
    does is not recorded: its series would stay for good.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        knows: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self.knows = knows
        self.requests = Counter(
            "dynamic_lora_requests",
            "HTTP requests by method, route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "dynamic_lora_prompt_tokens",
            "Prompt tokens taken in.",
            ["adapter"],
            registry=self.registry,
        )
        self.generated_tokens = Counter(
            "dynamic_lora_generated_tokens",
            "Tokens generated.",
            ["adapter"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "dynamic_lora_time_to_first_token_seconds",
            "From the request to a continuation's first token.",
            ["adapter"],
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.tpot = Histogram(
            "dynamic_lora_time_per_output_token_seconds",
            "Mean time between a continuation's tokens after its first.",
            ["adapter"],
            buckets=_TPOT_BUCKETS,
            registry=self.registry,
        )

        self.broken = Counter(
            "dynamic_lora_broken_generations",
            "Generations that had begun and did not come to their end, by cause.",
            ["cause"],
            registry=self.registry,
        )
        for cause in _CAUSES.values():
            self.broken.labels(cause)  # 0 is told, too

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def forget(self, adapter: str) -> None:
        """Drop the series of an adapter that is no more: names would come and never go."""
        for metric in (self.prompt_tokens, self.generated_tokens, self.ttft, self.tpot):
            with suppress(KeyError):  # nobody asked for it
                metric.remove(adapter)

    async def observed(
        self, events: AsyncGenerator[GenerationEvent, None]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Pass a generation's events on and record them under its adapter's name."""
        observation = _Observation(self)
        async with aclosing(events):
            try:
                async for event in events:
                    observation.record(event)
                    yield event
            except BaseException as error:
                observation.break_off(error)
                raise


class _Observation:
    """One generation as the metrics see it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._name: str | None = None
        self._label = BASE
        self._asked = metrics.clock()
        self._first: dict[int, float] = {}
        self._num_finished = 0
        self._started = False

    def record(self, event: GenerationEvent) -> None:
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, TokenPiece):
            self._token(event)
        elif isinstance(event, Finish):
            self._finish(event)

    def break_off(self, error: BaseException) -> None:
        """Count a generation that ends with an error, or is closed after its first token."""
        closed = isinstance(error, _CLOSED)
        begun = self._num_finished < len(self._first) if closed else self._started
        cause = next((cause for kind, cause in _CAUSES.items() if isinstance(error, kind)), None)
        if begun and cause is not None:
            self._metrics.broken.labels(cause).inc()

    @property
    def _gone(self) -> bool:
        return self._name is not None and not self._metrics.knows(self._name)

    def _start(self, started: Started) -> None:
        self._started = True
        self._name = started.name
        if started.adapter is not None:
            # Sums count under one label: theirs would come and never go.
            self._label = started.name or SUMS
        if not self._gone:
            self._metrics.prompt_tokens.labels(self._label).inc(started.num_prompt_tokens)

    def _token(self, piece: TokenPiece) -> None:
        is_first = piece.index not in self._first
        if is_first:
            self._first[piece.index] = self._metrics.clock()
        if self._gone:
            return
        self._metrics.generated_tokens.labels(self._label).inc()
        if is_first:
            waited = self._first[piece.index] - self._asked
            self._metrics.ttft.labels(self._label).observe(waited)

    def _finish(self, finish: Finish) -> None:
        self._num_finished += 1
        num_gaps = finish.num_output_tokens - 1
        if num_gaps > 0 and not self._gone:
            span = self._metrics.clock() - self._first[finish.index]
            self._metrics.tpot.labels(self._label).observe(span / num_gaps)


class RequestCounter:
    """ASGI middleware that counts every request by its route's template and its status.

    Where a layer before the router has answered, the route is looked for among `routes`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute] = ()) -> None:
        self._app = app
        self._requests = metrics.requests
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                labels = (method, self._template(scope), str(message["status"]))
                self._requests.labels(*labels).inc()
            await send(message)

        await self._app(scope, receive, counting)

    def _template(self, scope: Scope) -> str:
        """Unknown paths share one label, or a scanner would fill the memory."""
        route = scope.get("route")
        if route is None:
            matching = (one for one in self._routes if one.matches(scope)[0] is not Match.NONE)
            route = next(matching, None)
        return getattr(route, "path_format", "unmatched")


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Reading:
    """One value of the engine's at the moment of a scrape; `total` marks a counter.

    `label` is the name and the value of a label; readings of one name follow each other.
    """

    name: str
    text: str
    value: float
    total: bool = False
    label: tuple[str, str] | None = None


class EngineCollector(Collector):
    """Asks for the engine's state when Prometheus does; nothing before the model is loaded.

    `readings` and `residency` (adapter names with whether they are on the
    device) are called on the thread that renders.
    """

    def __init__(
        self,
        readings: Callable[[], Sequence[Reading]],
        residency: Callable[[], Mapping[str, bool]],
    ) -> None:
        self._readings = readings
        self._residency = residency

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus_client."""
        for name, same in groupby(self._readings(), key=lambda reading: reading.name):
            yield _family(f"dynamic_lora_{name}", list(same))
        resident = GaugeMetricFamily(
            "dynamic_lora_adapter_resident",
            "1 while the adapter's weights are on the device.",
            labels=["adapter"],
        )
        for name, on_device in self._residency().items():
            resident.add_metric([name], float(on_device))
        yield resident


def _family(name: str, readings: Sequence[Reading]) -> Metric:
    first = readings[0]
    family = CounterMetricFamily if first.total else GaugeMetricFamily
    metric = family(name, first.text, labels=[first.label[0]] if first.label else [])
    for reading in readings:
        metric.add_metric([reading.label[1]] if reading.label else [], reading.value)
    return metric
