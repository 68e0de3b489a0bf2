"""Bodies that take long to parse and check: threads do so, and say what is wrong as always."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_server.schemas import _base
from tests.server.routes.test_chat import serving

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "base", "prompt": ["hi"], "max_tokens": 1}),
    ("/generate", {"inputs": "hi"}),
    ("/tokenize", {"prompt": "hi"}),
]


def written(body: dict[str, Any], *, large: bool) -> bytes:
    """The body as JSON, with white space that makes it large."""
    return json.dumps(body).encode() + b" " * (300_000 if large else 0)


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_large_bodies_are_checked_on_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    threads: set[str] = set()
    check = _base._check_encodable

    def note(text: str) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        check(text)

    monkeypatch.setattr(_base, "_check_encodable", note)
    async with serving(tmp_path) as (client, _):
        headers = {"content-type": "application/json"}
        for large in (False, True):
            threads.clear()
            answer = await client.post(path, content=written(body, large=large), headers=headers)
            assert answer.status_code == 200, answer.text
            assert threads == {"parse" if large else threading.current_thread().name}


WRONG = [
    ("/generate", b'{"inputs": "hi", "paramters": {}}'),
    ("/generate", b'{"inputs": "hi", "parameters": {"temperature": -1}}'),
    ("/generate", b'{"inputs": "hi", "inputs": "ho"}'),
    ("/generate", b'{"inputs": "hi"'),
    ("/generate", b'{"inputs": "\xff"}'),
    ("/generate", b'{"inputs": "hi", "parameters": ' + b"[" * 200_000),
    ("/v1/completions", b'{"model": "base"}'),
    ("/v1/chat/completions", b'{"model": "base", "messages": [{"role": "usr", "content": ""}]}'),
    ("/tokenize", b"[]"),
]


async def test_what_is_wrong_is_told_alike_however_large_a_body_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as (client, _):
        for path, body in WRONG:
            for kind in ("application/json", "text/plain"):
                told = [
                    await client.post(path, content=content, headers={"content-type": kind})
                    for content in (body, b" " * 300_000 + body)
                ]
                small, large = ((one.status_code, _document(one.text)) for one in told)
                assert small[0] in (400, 415, 422)
                assert small == large


def _document(text: str) -> str:
    """An error without the place in the body, which is another behind white space."""
    return text.partition(" at character")[0]


async def test_more_messages_than_any_context_holds_are_refused(tmp_path: Path) -> None:
    message, part = {"role": "user", "content": "x"}, {"type": "text", "text": "x"}
    many: list[tuple[str, list[Any], str]] = [
        ("messages", [message] * 20_000, "holds 20,000 messages; at most 16,384 are taken"),
        (
            "messages.0.content",
            [{"role": "user", "content": [part] * 20_000}],
            "holds 20,000 parts; at most 16,384 are taken",
        ),
    ]
    async with serving(tmp_path) as (client, _):
        for place, messages, text in many:
            body = {"model": "base", "messages": messages}
            refused = await client.post("/v1/chat/completions", json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == place
            assert text in refused.json()["error"]["message"]
            refused = await client.post("/tokenize", json=body)
            assert refused.status_code == 422
            assert text in refused.json()["detail"]
