"""Request ids on every answer, and the line that the log has of each request."""

import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from fastapi import FastAPI

from dynamic_lora_server.app import create_app
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.http.access_log import note_adapter, request_id

LOGGER = "dynamic_lora_server.http.access_log"


def _never() -> NoReturn:
    raise RuntimeError("no model in this test")


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """A server without a model, and with routes that fail, and that an adapter answers."""
    app = create_app(ServerConfig(home=tmp_path, max_body_bytes=100), load=_never)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the books do not balance")

    @app.get("/answered")
    async def answered() -> str:
        note_adapter("ner")
        return request_id()

    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/nowhere", 404), ("/info", 503), ("/v1/models", 503), ("/broken", 500)],
)
async def test_every_answer_carries_an_id_of_its_own(
    client: httpx.AsyncClient, path: str, status: int
) -> None:
    answers = [await client.get(path) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {status}
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


async def test_a_refusal_before_the_routes_carries_one_too(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", content=b"x" * 200, headers={"x-request-id": "mine"})
    assert answer.status_code == 413
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("sent", ["abc", "~!" * 64, "a=b;c"])
async def test_a_clients_own_id_is_kept(client: httpx.AsyncClient, sent: str) -> None:
    answer = await client.get("/answered", headers={"x-request-id": sent})
    assert answer.headers["x-request-id"] == answer.json() == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "a\tb", "é"])
async def test_one_that_cannot_be_used_is_replaced(client: httpx.AsyncClient, sent: str) -> None:
    answer = await client.get("/answered", headers={b"x-request-id": sent.encode()})
    assert answer.headers["x-request-id"] == answer.json() != sent
    assert len(answer.json()) == 32


def test_outside_of_a_request_there_is_none() -> None:
    note_adapter("ner")
    assert request_id() == "-"


async def test_the_log_has_one_line_for_each_request(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"x-request-id": "mine"}
    with caplog.at_level(logging.INFO, LOGGER):
        for path in ("/answered?q=secret", "/nowhere%0AGET%20/x", "/health", "/ready", "/metrics"):
            await client.get(path, headers=headers)
    lines = [re.sub(r"\d+\.\d{3}s", "0s", record.getMessage()) for record in caplog.records]
    assert [line for line in lines if "request=" in line] == [
        "GET /answered 200 0s adapter=ner request=mine",
        "GET /nowhere%0AGET%20/x 404 0s adapter=- request=mine",
    ]


async def test_probes_are_logged_for_those_who_look_for_faults(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        await client.get("/health")
    (line,) = [record for record in caplog.records if record.name == LOGGER]
    assert line.levelno == logging.DEBUG
    assert line.getMessage().startswith("GET /health 200")


async def test_errors_in_the_log_name_the_request(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await client.get("/broken", headers={"x-request-id": "mine"})
    messages = [record.getMessage() for record in caplog.records]
    assert "GET /broken: the books do not balance (request mine)" in messages
    assert any(re.match(r"GET /broken 500 .* request=mine", message) for message in messages)


def test_the_openapi_document_has_the_header(app: FastAPI) -> None:
    document = app.openapi()
    reference = {"$ref": "#/components/headers/X-Request-Id"}
    assert "X-Request-Id" in document["components"]["headers"]
    for path in ("/health", "/tokenize"):
        for operation in document["paths"][path].values():
            for answer in operation["responses"].values():
                assert answer["headers"]["X-Request-Id"] == reference
