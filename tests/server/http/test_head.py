"""HEAD on a server that loads: as GET, without a body, and counted as what it is."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from dynamic_lora_server.app import create_app
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.http.head import HeadAsGet


@pytest.mark.parametrize("path", ["/health", "/ready", "/adapters", "/metrics", "/nowhere"])
def test_head_answers_as_get(path: str, tmp_path: Path) -> None:
    client = TestClient(create_app(ServerConfig(home=tmp_path)))
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(("method", "sent"), [("HEAD", [b"", b""]), ("GET", [b"a", b"b"])])
async def test_head_has_no_body(method: str, sent: list[bytes]) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append(scope["method"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        seen.append(message.get("body"))

    await HeadAsGet(app)({"type": "http", "method": method}, receive, send)
    assert seen == ["GET", None, *sent]


def test_head_wants_the_key_that_get_does(tmp_path: Path) -> None:
    client = TestClient(create_app(ServerConfig(home=tmp_path, api_keys=("key",))))
    assert client.head("/adapters").status_code == 401
    counted = client.get("/metrics", headers={"authorization": "Bearer key"}).text
    assert 'requests_total{method="HEAD",route="/adapters",status="401"} 1.0' in counted
