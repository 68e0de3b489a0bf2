"""`/v1/chat/completions` on a server in this process: what is refused before a chat costs much."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_server.app import create_app
from dynamic_lora_server.generation import TokenLogprob
from dynamic_lora_server.requests import prompts
from dynamic_lora_server.runtime import Runtime
from dynamic_lora_server.text import TokenizerView
from tests.support.runtimes import load_runtime, spec, tiny_config


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Runtime]]:
    """A client of a server that is ready, on this event loop, and what it serves with."""
    ready: asyncio.Future[Runtime] = asyncio.get_running_loop().create_future()
    app = create_app(
        tiny_config(folder, **changes),
        load=partial(load_runtime, folder, **changes),
        on_ready=ready.set_result,
    )
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client,
    ):
        yield client, await asyncio.wait_for(ready, 60)


def body(text: str) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 1}


async def test_a_chat_that_has_no_place_is_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, max_running=1, max_waiting=0) as (client, runtime):
        taken = runtime.service.stream(spec(max_new_tokens=400))
        await anext(taken)
        for path, asked in (
            ("/v1/chat/completions", body("hi")),
            ("/v1/responses", {"model": "base", "input": "hi"}),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(prompts, "render", None)
                refused = await client.post(path, json=asked)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        await taken.aclose()
        answer = await client.post("/v1/chat/completions", json=body("hi"))
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", body("hi") | {"logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"model": "base", "prompt": "hi", "logprobs": 2}),
        (
            "/v1/responses",
            {
                "model": "base",
                "input": "hi",
                "include": ["message.output_text.logprobs"],
                "top_logprobs": 2,
                "max_output_tokens": 1,
            },
        ),
        ("/generate", {"inputs": "hi", "parameters": {"details": True, "top_n_tokens": 2}}),
    ],
)
async def test_log_probabilities_are_written_on_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, asked: dict[str, Any]
) -> None:
    """Those of a long answer take seconds, in which no stream would go on."""
    threads: set[str] = set()

    def text(self: TokenLogprob) -> str:
        threads.add(threading.current_thread().name)
        return self.token_bytes.decode(errors="replace")

    async with serving(tmp_path) as (client, _):
        monkeypatch.setattr(TokenLogprob, "text", property(text))
        answer = await client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    assert threads
    assert all(name.startswith("write") for name in threads)


async def test_a_chat_far_over_the_context_is_not_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as (client, _):
        monkeypatch.setattr(TokenizerView, "encode", None)
        refused = await client.post("/v1/chat/completions", json=body("the rain " * 100_000))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "at least" in refused.json()["error"]["message"]
