"""The closed loop, against a small streaming application on a socket."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import repeat
from typing import Any

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.load import closed_loop, connect, measure, send_streaming
from benchmarks.stats import Timing
from benchmarks.wire import DynamicLoraWire, LlamaCppWire, OpenAIWire, Wire
from benchmarks.workload import Popularity, PromptMaker, Request, Sampling, Workload

NAMES = ["a", "b"]
WIRES: list[Wire] = [DynamicLoraWire(NAMES), OpenAIWire("base", NAMES), LlamaCppWire(len(NAMES))]


class _Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {"word": 0, "other": 1}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return tokens[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [len(word) for word in text.split()]


def _events(path: str, num_tokens: int) -> list[dict[str, Any]]:
    if path == "/completion":
        last = {"stop": True, "tokens_predicted": num_tokens, "tokens_evaluated": 4}
        return [{"content": "x", "stop": False}] * num_tokens + [last]
    if path == "/v1/completions":
        # Two tokens in the first event: the usage is what counts.
        chunks = [{"choices": [{"text": "x"}]}] * max(num_tokens - 1, 1)
        return [*chunks, {"choices": [], "usage": {"completion_tokens": num_tokens}}]
    token = {"token": {"id": 1, "text": "x"}, "details": None}
    return [token] * (num_tokens - 1) + [{**token, "details": {"generated_tokens": num_tokens}}]


class _Server:
    """Streams the tokens that were asked, `short` fewer; remembers what it was asked."""

    def __init__(self, *, short: int = 0) -> None:
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.num_running = 0
        self.most_running = 0
        self._short = short
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.answer, methods=["POST"])

    async def answer(self, path: str, request: HttpRequest) -> Response:
        body = await request.json()
        self.asked.append((dict(request.query_params), body))
        if body.get("prompt", body.get("inputs")) == "refuse":
            return JSONResponse({"detail": "queue full"}, status_code=429)
        wanted = body.get("max_tokens") or body.get("n_predict")
        wanted = wanted or body["parameters"]["max_new_tokens"]
        events = _events(f"/{path}", wanted - self._short)
        return StreamingResponse(self._stream(events), media_type="text/event-stream")

    async def _stream(self, events: list[dict[str, Any]]) -> AsyncIterator[str]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        for event in events:
            await asyncio.sleep(0.001)
            yield f"data: {json.dumps(event)}\n\n"
        self.num_running -= 1
        yield "data: [DONE]\n\n"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, lifespan="off"))
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            async with connect(f"http://127.0.0.1:{sock.getsockname()[1]}") as http:
                yield http
            server.should_exit = True
            await serving


def _request(prompt: str = "hello", adapter: int | None = 1) -> Request:
    return Request(prompt=prompt, adapter=adapter, num_output_tokens=5)


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: type(wire).__name__)
async def test_every_wire_counts_the_tokens(wire: Wire) -> None:
    async with _Server().client() as http:
        timing = await send_streaming(http, wire, _request())
    assert timing.num_output_tokens == 5
    assert timing.sent < timing.first_token <= timing.last_token


async def test_every_wire_names_the_adapter() -> None:
    server = _Server()
    async with server.client() as http:
        for wire in WIRES:
            await send_streaming(http, wire, _request(adapter=1))
            await send_streaming(http, wire, _request(adapter=None))
    named, base, *rest = server.asked
    assert (named[0], base[0]) == ({"adapter": "b"}, {})
    assert [body["model"] for _, body in rest[:2]] == ["b", "base"]
    scales = [[entry["scale"] for entry in body["lora"]] for _, body in rest[2:]]
    assert scales == [[0.0, 1.0], [0.0, 0.0]]


async def test_every_wire_says_how_tokens_are_chosen() -> None:
    server = _Server()
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=40)
    drawn = Request(prompt="hello", adapter=0, num_output_tokens=5, sampling=sampling)
    async with server.client() as http:
        for wire in WIRES:
            await send_streaming(http, wire, drawn)
            await send_streaming(http, wire, _request())
    bodies = [body.get("parameters", body) for _, body in server.asked]
    keys = ("temperature", "top_p", "top_k")
    assert [[body.get(key) for key in keys] for body in bodies[::2]] == [[0.7, 0.9, 40]] * 3
    assert [[body.get(key) for key in keys] for body in bodies[1::2]] == [[0, None, None]] * 3
    assert [body.get("min_p") for body in bodies] == [None, None, None, None, 0, 0]


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: type(wire).__name__)
async def test_a_short_answer_fails(wire: Wire) -> None:
    async with _Server(short=2).client() as http:
        with pytest.raises(RequestFailed, match="5 tokens were asked, 3 came"):
            await send_streaming(http, wire, _request())


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: type(wire).__name__)
def test_an_error_event_fails(wire: Wire) -> None:
    with pytest.raises(RequestFailed, match="the stream reported: out of memory"):
        wire.read({"error": "out of memory"})


async def test_a_refusal_fails_with_its_text() -> None:
    async with _Server().client() as http:
        with pytest.raises(RequestFailed, match="status 429.*queue full"):
            await send_streaming(http, WIRES[0], _request("refuse"))


async def test_the_loop_keeps_every_client_busy_and_counts_failures() -> None:
    server = _Server()
    work = [_request() for _ in range(11)] + [_request("refuse")]
    async with server.client() as http:
        result = await closed_loop(
            lambda request: send_streaming(http, WIRES[1], request), work, num_clients=3
        )
    assert len(result.timings) == 11
    assert len(result.failures) == 1
    assert len(server.asked) == 12
    assert server.most_running == 3


async def test_the_loop_never_exceeds_its_clients() -> None:
    running, most = 0, 0

    async def send(_: Request) -> Timing:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)

    result = await closed_loop(send, [_request()] * 20, num_clients=4)
    assert (len(result.timings), most) == (20, 4)


async def test_the_loop_ends_by_time_after_a_multiple_of_the_clients() -> None:
    async def send(_: Request) -> Timing:
        await asyncio.sleep(0.02)
        return Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)

    result = await closed_loop(send, repeat(_request()), num_clients=3, seconds=0.05)
    assert result.wall_s >= 0.05
    assert 3 <= len(result.timings) <= 12
    assert len(result.timings) % 3 == 0


async def test_requests_go_on_to_a_multiple_of_the_clients() -> None:
    """One client is quick: at the end of the time the others still get their requests."""
    sent = 0

    async def send(_: Request) -> Timing:
        nonlocal sent
        sent += 1
        await asyncio.sleep(0.001 if sent == 1 else 0.05)
        return Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)

    result = await closed_loop(send, repeat(_request()), num_clients=4, seconds=0.01)
    assert len(result.timings) == 8


async def test_the_loop_ends_where_work_ends_before_the_time() -> None:
    async def send(_: Request) -> Timing:
        return Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)

    result = await closed_loop(send, [_request()] * 5, num_clients=3, seconds=60.0)
    assert len(result.timings) == 5


async def test_measure_counts_the_cell_and_not_the_warm_up() -> None:
    server = _Server()
    workload = _workload(num_requests=6)
    async with server.client() as http:
        summary = await measure(http, WIRES[0], workload, PromptMaker(_Tokenizer(), 4))
    assert (summary.num_requests, summary.num_output_tokens) == (6, 30)
    assert summary.tokens_per_s == pytest.approx(30 / summary.wall_s)
    assert len(server.asked) == 8  # and two to warm up


async def test_measure_stops_at_a_failing_warm_up() -> None:
    async with _Server(short=1).client() as http:
        with pytest.raises(BenchmarkError, match="warm-up failed: 2x 5 tokens were asked, 4 came"):
            await measure(http, WIRES[0], _workload(), PromptMaker(_Tokenizer(), 4))


def _workload(num_requests: int = 4) -> Workload:
    return Workload(
        num_clients=2,
        popularity=Popularity.parse("uniform"),
        num_adapters=2,
        num_prompt_tokens=4,
        num_output_tokens=5,
        num_requests=num_requests,
    )
