"""The clients on a real socket: what a transport without a network cannot show."""

import asyncio
import math
import threading
import tracemalloc
from pathlib import Path

import httpx
import pytest

from dynamic_lora_client import AsyncClient, Client, StreamBroken, Timeout, Token, TransportError
from tests.clients.wire import PASSPORT, STREAM, TEXT, Wire, sse, token_event


def test_stream_arrives_token_by_token(wire: Wire) -> None:
    chunks = [sse(token_event(index)) for index in range(3)]
    go_on = threading.Semaphore(0)
    wire.reply(chunks=chunks, go_on=go_on)
    with Client(wire.url) as client:
        stream = client.stream("a")
        for _ in chunks:
            go_on.release()  # the server sends the next chunk no sooner
            next(stream)
        assert len(list(stream)) == 1  # the last two come from one event


async def test_async_stream_cut_anywhere(wire: Wire) -> None:
    wire.reply(chunks=[STREAM[start : start + 7] for start in range(0, len(STREAM), 7)])
    async with AsyncClient(wire.url) as client:
        events = [event async for event in client.stream("a")]
    assert events[-1].text == TEXT


def test_closing_a_stream_hangs_up(wire: Wire) -> None:
    wire.reply(chunks=[sse(token_event(0))] * 100, pause=0.02)
    with Client(wire.url) as client:
        events = client.stream("a")
        assert isinstance(next(events), Token)
        events.close()
        assert wire.sees_hang_up()


async def test_this_machine_is_asked_past_the_proxy(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.2:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    wire.reply(PASSPORT)
    wire.reply(PASSPORT)
    with Client(wire.url) as client:
        assert client.adapter("ner").name == "ner"
    async with AsyncClient(wire.url) as client_of_tasks:
        assert (await client_of_tasks.adapter("ner")).name == "ner"


def test_another_machine_is_asked_through_the_proxy(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", wire.url)
    wire.reply(PASSPORT)
    with Client("http://lora.example.org:8000") as client:
        client.adapter("ner")
    assert wire.received[0].target == "http://lora.example.org:8000/adapters/ner"


async def test_calls_beyond_the_connections_wait_for_one_to_end(wire: Wire) -> None:
    wire.reply(chunks=[sse(token_event(0))] * 100, pause=0.02)
    wire.reply(PASSPORT)
    async with AsyncClient(wire.url, max_connections=1) as client:
        events = client.stream("a")
        assert isinstance(await anext(events), Token)
        waiting = asyncio.create_task(client.adapter("ner"))
        await asyncio.sleep(0.1)
        assert len(wire.received) == 1
        await events.aclose()
        assert (await waiting).name == "ner"


def test_silent_server_is_given_up(wire: Wire) -> None:
    wire.reply(chunks=[b"{}"], pause=1.0)
    with Client(wire.url, read_timeout=0.2) as client, pytest.raises(Timeout, match="silent"):
        client.generate("a")


@pytest.mark.parametrize("seconds", [math.inf, 1e10, threading.TIMEOUT_MAX])
async def test_timeouts_may_be_without_bound(wire: Wire, seconds: float) -> None:
    wire.reply(PASSPORT)
    wire.reply(PASSPORT)
    with Client(wire.url, connect_timeout=seconds, read_timeout=seconds) as client:
        assert client.adapter("ner").name == "ner"
    async with AsyncClient(
        wire.url, connect_timeout=seconds, read_timeout=seconds
    ) as client_of_tasks:
        assert (await client_of_tasks.adapter("ner")).name == "ner"


async def test_a_proxy_whose_name_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://my..proxy:3128")
    with (
        Client("http://lora.example.org") as client,
        pytest.raises(TransportError, match="Cannot connect"),
    ):
        client.adapters()
    async with AsyncClient("http://lora.example.org") as client_of_tasks:
        with pytest.raises(TransportError, match="Cannot connect"):
            await client_of_tasks.adapters()


def test_silence_within_a_stream_breaks_it(wire: Wire) -> None:
    wire.reply(chunks=[STREAM[:9], STREAM[9:]], pause=1.0)
    with (
        Client(wire.url, read_timeout=0.3) as client,
        pytest.raises(StreamBroken, match=r"silent for 0\.3 s"),
    ):
        list(client.stream("a"))
    assert len(wire.received) == 1


async def test_connection_lost_within_a_stream_breaks_it(wire: Wire) -> None:
    wire.reply(chunks=[sse(token_event(0))], breaks=True)
    async with AsyncClient(wire.url) as client:
        with pytest.raises(StreamBroken, match="connection was lost"):
            async for _ in client.stream("a"):
                pass
    assert len(wire.received) == 1


def test_nobody_listens(wire: Wire) -> None:
    port = int(wire.url.rpartition(":")[2])
    with (
        Client(f"http://127.0.0.2:{port}") as client,
        pytest.raises(TransportError, match="Cannot"),
    ):
        client.adapters()


def test_upload_arrives_whole_with_its_length_announced(wire: Wire, tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    archive = tmp_path / "ner.tar"
    archive.write_bytes(content)
    wire.reply(PASSPORT, status=201)
    seen: list[int] = []
    with Client(wire.url) as client:
        client.upload("ner", archive, on_progress=lambda sent, _: seen.append(sent))
    (received,) = wire.received
    assert content in received.body
    assert int(received.headers["content-length"]) == len(received.body)
    assert seen[-1] == len(content)
    assert len(seen) > 20


class _Drain(httpx.BaseTransport):
    """Takes a request's body piece by piece and keeps nothing of it."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        self.num_bytes = sum(len(chunk) for chunk in request.stream)
        return httpx.Response(201, json=PASSPORT)


def test_upload_is_never_whole_in_memory(tmp_path: Path) -> None:
    size = 64_000_000
    archive = tmp_path / "ner.tar"
    with archive.open("wb") as file:
        file.truncate(size)
    drain = _Drain()
    with Client(transport=drain) as client:
        tracemalloc.start()
        try:
            client.upload("ner", archive)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert drain.num_bytes > size
    assert peak < 4_000_000
