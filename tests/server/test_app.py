"""The application before, without and beside a model."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from dynamic_lora_server.app import create_app
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.errors import UnsupportedModel
from tests.support.eventually import eventually
from tests.support.runtimes import load_runtime, tiny_config


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server") as client,
    ):
        yield client


async def test_while_the_model_loads_only_health_and_metrics_answer(tmp_path: Path) -> None:
    release = threading.Event()

    def load() -> NoReturn:
        release.wait(30)
        raise RuntimeError("not in this test")

    app = create_app(ServerConfig(home=tmp_path), load=load)
    try:
        async with client_of(app) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/metrics")).status_code == 200
            for path in ("/ready", "/info", "/adapters"):
                response = await client.get(path)
                assert response.status_code == 503
                assert response.headers["retry-after"] == "5"
                assert response.json()["type"] == "/problems/not-ready"
                assert "loading" in response.json()["detail"]
            openai = await client.get("/v1/models")
            assert openai.status_code == 503
            assert openai.json()["error"]["code"] == "not_ready"
    finally:
        release.set()


async def test_a_load_that_fails_is_told_and_explained(tmp_path: Path) -> None:
    told: asyncio.Queue[Exception] = asyncio.Queue()

    def load() -> NoReturn:
        raise UnsupportedModel("Falcon does not go through the interface.")

    app = create_app(ServerConfig(home=tmp_path), load=load, on_failure=told.put_nowait)
    async with client_of(app) as client:
        error = await asyncio.wait_for(told.get(), 5)
        assert isinstance(error, UnsupportedModel)
        assert "Falcon" in (await client.get("/ready")).json()["detail"]
        assert (await client.get("/health")).status_code == 200


async def test_an_engine_that_breaks_is_told_like_a_load_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: asyncio.Queue[Exception] = asyncio.Queue()
    ready = asyncio.Event()
    app = create_app(
        tiny_config(tmp_path),
        load=partial(load_runtime, tmp_path),
        on_ready=lambda _: ready.set(),
        on_failure=told.put_nowait,
    )

    def broken(*_: object) -> None:
        raise RuntimeError("the books do not balance")

    async with client_of(app) as client:
        await asyncio.wait_for(ready.wait(), 60)
        monkeypatch.setattr(Scheduler, "schedule", broken)
        response = await client.post("/generate", json={"inputs": "the king"})
        assert response.status_code == 500
        error = await asyncio.wait_for(told.get(), 5)
        assert str(error) == "the engine has stopped: RuntimeError: the books do not balance."
        assert (await client.get("/ready")).status_code == 503


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_cap(tmp_path: Path, declared: bool) -> None:
    app = create_app(ServerConfig(home=tmp_path, max_body_bytes=100), load=_never)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10

    async with client_of(app) as client:
        response = await client.post(
            "/generate",
            content=b"x" * 200 if declared else body(),
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 413
    assert response.json()["detail"] == "The body is larger than 100 bytes."


def test_every_answer_is_counted_under_its_route(tmp_path: Path) -> None:
    config = ServerConfig(
        home=tmp_path, max_body_bytes=100, api_keys=("key",), admin_keys=("root",)
    )
    app = create_app(config, load=_never)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("nobody foresaw this")

    client = TestClient(app, raise_server_exceptions=False)
    key = {"authorization": "Bearer key"}
    asked: list[tuple[str, str, dict[str, str], str, int]] = [
        ("GET", "/broken", key, "/broken", 500),
        ("GET", "/info", {}, "/info", 401),
        ("DELETE", "/adapters/ner", key, "/adapters/{name}", 403),
        ("GET", "/adapters/org%2FName", key, "/adapters/{name}", 503),
        ("POST", "/generate", key | {"content-length": "200"}, "/generate", 413),
        ("GET", "/v1/models/org/base", key, "/v1/models/{model}", 503),
        ("GET", "/no-such-route", key, "unmatched", 404),
    ]
    for method, path, headers, route, status in asked:
        content = b"x" * int(headers.get("content-length", 0))
        answer = client.request(method, path, headers=headers, content=content)
        assert answer.status_code == status
        labels = f'method="{method}",route="{route}",status="{status}"'
        counted = client.get("/metrics", headers=key).text
        assert f"dynamic_lora_requests_total{{{labels}}} 1.0" in counted


def _never() -> NoReturn:
    raise RuntimeError("no model in this test")


async def test_bodies_on_their_way_are_bounded_together(tmp_path: Path) -> None:
    app = create_app(ServerConfig(home=tmp_path, max_body_bytes=100), load=_never)
    go_on, arrived = asyncio.Event(), []

    async def slowly() -> AsyncIterator[bytes]:
        yield b" " * 90
        arrived.append(90)
        await go_on.wait()
        yield b"{"

    headers = {"content-type": "application/json"}
    async with client_of(app) as client:
        arriving = [
            asyncio.create_task(client.post("/generate", content=slowly(), headers=headers))
            for _ in range(71)
        ]
        await eventually(lambda: len(arrived) == len(arriving), "all have sent the most of theirs")
        refused = await client.post("/generate", content=b" " * 20, headers=headers)
        go_on.set()
        statuses = {(await task).status_code for task in arriving}
        later = await client.post("/generate", content=b" " * 20, headers=headers)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "5"
    assert refused.json()["type"] == "/problems/queue-full"
    assert statuses == {400}
    assert later.status_code == 400


async def test_a_client_that_goes_while_it_sends_its_body_made_no_mistake(tmp_path: Path) -> None:
    app = create_app(ServerConfig(home=tmp_path), load=_never)
    parts: list[Message] = [
        {"type": "http.request", "body": b'{"inputs":', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return parts.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async with client_of(app):
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/tokenize",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await app(scope, receive, send)
    assert sent[0]["status"] == 499


def test_the_openapi_document_describes_the_errors(tmp_path: Path) -> None:
    document = create_app(ServerConfig(home=tmp_path)).openapi()
    generate = document["paths"]["/generate"]["post"]
    problem = generate["responses"]["404"]["content"]["application/problem+json"]["schema"]
    assert problem == {"$ref": "#/components/schemas/Problem"}
    assert {"Problem", "StreamEvent", "Token"} <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in str(document)
    upload = document["paths"]["/adapters"]["post"]["requestBody"]["content"]
    assert set(upload) == {"multipart/form-data", "application/json"}
