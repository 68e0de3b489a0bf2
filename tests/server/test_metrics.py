"""What the metrics say of generations, requests and the engine."""

from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message, Receive, Scope, Send

from dynamic_lora_server.errors import EngineFailed, GrammarFailed, NotReady
from dynamic_lora_server.generation import (
    Finish,
    FinishReason,
    GenerationEvent,
    ServedMode,
    Started,
    TokenPiece,
)
from dynamic_lora_server.metrics import EngineCollector, Metrics, Reading, RequestCounter

PIECE = TokenPiece(index=0, token_id=5, text="a", token_bytes=b"a", offset=0, special=False)
FINISH = Finish(
    index=0,
    reason=FinishReason.EOS,
    text="aa",
    tail="",
    num_prompt_tokens=4,
    num_output_tokens=3,
    seed=None,
    mode=ServedMode.BASE,
)


async def play() -> AsyncGenerator[GenerationEvent, None]:
    yield Started(adapter="ner", version="abc", num_prompt_tokens=4, name="ner")
    yield PIECE
    yield PIECE
    yield PIECE
    yield FINISH


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"dynamic_lora_{name}", labels)


async def test_a_generation_is_counted_under_its_adapter() -> None:
    ticks = iter([0.0, 2.0, 3.0])
    metrics = Metrics(clock=lambda: next(ticks))
    assert len([event async for event in metrics.observed(play())]) == 5
    assert value(metrics, "prompt_tokens_total", adapter="ner") == 4
    assert value(metrics, "generated_tokens_total", adapter="ner") == 3
    assert value(metrics, "time_to_first_token_seconds_sum", adapter="ner") == 2.0
    assert value(metrics, "time_per_output_token_seconds_sum", adapter="ner") == 0.5


async def test_the_series_of_a_deleted_adapter_go() -> None:
    metrics = Metrics()
    async for _ in metrics.observed(play()):
        pass
    assert b'adapter="ner"' in metrics.render()
    metrics.forget("ner")
    metrics.forget("nobody asked for it")
    assert b'adapter="ner"' not in metrics.render()


async def test_a_request_that_outlives_its_adapter_brings_no_series_back() -> None:
    names = {"ner"}
    metrics = Metrics(knows=names.__contains__)
    events = metrics.observed(play())
    for _ in range(2):  # the start and one token
        await anext(events)
    names.remove("ner")
    metrics.forget("ner")
    async for _ in events:
        pass
    assert b'adapter="ner"' not in metrics.render()


async def test_sums_and_the_base_count_under_names_of_their_own() -> None:
    async def begin(started: Started) -> AsyncGenerator[GenerationEvent, None]:
        yield started

    metrics = Metrics(knows=lambda _: False)
    for adapter in ("ner*0.5", None):
        started = Started(adapter=adapter, version=None, num_prompt_tokens=4)
        async for _ in metrics.observed(begin(started)):
            pass
    assert value(metrics, "prompt_tokens_total", adapter="composition") == 4
    assert value(metrics, "prompt_tokens_total", adapter="base") == 4


async def test_closing_an_observed_generation_closes_it() -> None:
    closed = []

    async def endless() -> AsyncGenerator[GenerationEvent, None]:
        try:
            while True:
                yield PIECE
        finally:
            closed.append(True)

    observed = Metrics().observed(endless())
    await anext(observed)
    await observed.aclose()
    assert closed == [True]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (EngineFailed("a step broke"), "step"),
        (GrammarFailed("no token can follow"), "grammar"),
        (NotReady("The server is shutting down."), "stop"),
        (ValueError("nobody foresaw this"), "other"),
    ],
)
async def test_a_generation_that_fails_after_it_began_is_counted_by_its_cause(
    error: Exception, cause: str
) -> None:
    async def failing(*, begun: bool) -> AsyncGenerator[GenerationEvent, None]:
        if begun:
            yield Started(adapter=None, version=None, num_prompt_tokens=4)
        raise error

    metrics = Metrics()
    for begun in (False, True):
        with pytest.raises(type(error)):
            async for _ in metrics.observed(failing(begun=begun)):
                pass
        assert value(metrics, "broken_generations_total", cause=cause) == begun
    assert value(metrics, "broken_generations_total", cause="client") == 0


@pytest.mark.parametrize(("num_events", "num_broken"), [(1, 0), (2, 1), (4, 1), (5, 0)])
async def test_a_client_that_goes_before_the_end_is_counted_from_its_first_token_on(
    num_events: int, num_broken: int
) -> None:
    """Before that a route may close a generation to begin another for the same request."""
    metrics = Metrics()
    events = metrics.observed(play())
    for _ in range(num_events):
        await anext(events)
    await events.aclose()
    assert value(metrics, "broken_generations_total", cause="client") == num_broken


async def test_unknown_paths_and_methods_share_a_label() -> None:
    metrics = Metrics()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        return

    counter = RequestCounter(app, metrics)
    for path in ("/a", "/b"):
        await counter({"type": "http", "method": "BREW", "path": path}, receive, send)
    labels = {"method": "other", "route": "unmatched", "status": "404"}
    assert value(metrics, "requests_total", **labels) == 2


def test_the_engine_is_asked_when_prometheus_asks() -> None:
    metrics = Metrics()
    running = [1]
    collector = EngineCollector(
        lambda: [
            Reading("running_sequences", "Running.", running[0]),
            Reading("engine_steps", "Steps.", 7, total=True),
            Reading(
                "graph_declined_steps", "Declined.", 2, total=True, label=("reason", "prompts")
            ),
            Reading("graph_declined_steps", "Declined.", 5, total=True, label=("reason", "rows")),
        ],
        lambda: {"ner": True, "describe": False},
    )
    metrics.registry.register(collector)
    running[0] = 3
    assert value(metrics, "running_sequences") == 3
    assert value(metrics, "engine_steps_total") == 7
    assert value(metrics, "graph_declined_steps_total", reason="prompts") == 2
    assert value(metrics, "graph_declined_steps_total", reason="rows") == 5
    assert value(metrics, "adapter_resident", adapter="ner") == 1
    assert value(metrics, "adapter_resident", adapter="describe") == 0
    assert b"dynamic_lora_running_sequences 3.0" in metrics.render()
