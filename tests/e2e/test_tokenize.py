"""`/tokenize` and `/detokenize` on a real server with a tiny base model."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_server.text import TokenizerView
from tests.support.adapters import make_adapter
from tests.support.eventually import eventually
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import CONTEXT_LENGTH, tiny_llama, tiny_tokenizer

VIEW = TokenizerView(tiny_tokenizer())
TEXT = "the rain, là-bas: 🌧 in the plain"
MESSAGES = [{"role": "user", "content": "the rain"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    adapter = make_adapter(folder / "terse", tiny_llama(), rank=4)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}, briefly")
    with listening(tiny_app(tiny_config(folder, served_model_names=("house",)))) as address:
        source = {"name": "terse", "source": str(adapter)}
        assert httpx.post(f"{address}/adapters", json=source).status_code == 201
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        yield client


async def tokenize(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await client.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_inputs_are_answered_with_each_tokens_place(client: httpx.AsyncClient) -> None:
    tokens = await tokenize(client, inputs=TEXT)
    assert [token["id"] for token in tokens] == list(VIEW.encode(TEXT, add_special_tokens=True))
    for token in tokens:
        assert token["text"] == TEXT[token["start"] : token["stop"]]
    (cloud,) = {(t["start"], t["stop"]) for t in tokens if t["text"] == "🌧"}
    assert cloud == (TEXT.index("🌧"), TEXT.index("🌧") + 1)
    assert await tokenize(client, inputs="", add_special_tokens=False) == []


async def test_a_prompt_is_counted(client: httpx.AsyncClient) -> None:
    expected = list(VIEW.encode(TEXT, add_special_tokens=True))
    for model in (None, "house", "terse*0.5", "tgi"):
        assert await tokenize(client, prompt=TEXT, model=model) == {
            "count": len(expected),
            "max_model_len": CONTEXT_LENGTH,
            "tokens": expected,
        }


@pytest.mark.parametrize("model", ["base", "house", "terse", "terse*0.5", "tgi"])
async def test_messages_are_counted_as_a_chat_counts_them(
    client: httpx.AsyncClient, model: str
) -> None:
    chat = {"model": model, "messages": MESSAGES, "max_tokens": 1}
    usage = (await client.post("/v1/chat/completions", json=chat)).json()["usage"]
    found = await tokenize(client, model=model, messages=MESSAGES)
    assert found["count"] == len(found["tokens"]) == usage["prompt_tokens"]
    text = (await client.post("/detokenize", json={"tokens": found["tokens"]})).json()["prompt"]
    own = "the rain, briefly" if model.startswith("terse") else "[user] the rain\n[assistant]"
    assert text == own


async def test_without_a_model_messages_are_the_bases(client: httpx.AsyncClient) -> None:
    named = await tokenize(client, model="base", messages=MESSAGES)
    assert await tokenize(client, messages=MESSAGES, add_generation_prompt=True) == named


async def test_where_the_text_of_a_conversation_ends(client: httpx.AsyncClient) -> None:
    async def text(**body: Any) -> str:
        found = await tokenize(client, **body)
        answer = await client.post("/detokenize", json={"tokens": found["tokens"]})
        return str(answer.json()["prompt"])

    assert await text(messages=MESSAGES, add_generation_prompt=False) == "[user] the rain\n"
    begun = [*MESSAGES, {"role": "assistant", "content": "It "}]
    on = await text(messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert on == "[user] the rain\n[assistant] It "


async def test_tokens_become_the_text_again(client: httpx.AsyncClient) -> None:
    for text in (TEXT, "", "</s> the end"):
        tokens = (await tokenize(client, prompt=text))["tokens"]
        answer = await client.post("/detokenize", json={"model": "house", "tokens": tokens})
        assert answer.json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "field", "text"),
    [
        ("tokenize", {}, "body", "needs inputs, prompt or messages"),
        ("tokenize", [], "body", "needs inputs, prompt or messages"),
        ("tokenize", {"inputs": "x", "prompt": "x"}, "prompt", "is not a field"),
        ("tokenize", {"inputs": "x", "Model": "base"}, "Model", "is not a field"),
        ("tokenize", {"inputs": ["x"]}, "inputs", "valid string"),
        ("tokenize", {"prompt": "\ud800"}, "prompt", "half of a character"),
        ("tokenize", {"prompt": "x", "return_token_strs": True}, "return_token_strs", "supported"),
        ("tokenize", {"messages": MESSAGES, "tools": [{}]}, "tools.0.type", "required"),
        (
            "tokenize",
            {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "does not write tools",
        ),
        ("tokenize", {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            "tokenize",
            {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs",
            "no variable",
        ),
        ("detokenize", {"tokens": [10**9]}, "tokens", "outside 0 to"),
        ("detokenize", {"tokens": [-1]}, "tokens.0", "greater than"),
        ("detokenize", {"tokens": [0], "skip": True}, "skip", "is not a field"),
    ],
)
async def test_what_is_refused(
    client: httpx.AsyncClient, path: str, body: Any, field: str, text: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = await client.post(f"/{path}", content=json.dumps(body), headers=headers)
    problem = answer.json()
    assert (answer.status_code, problem["field"]) == (422, field)
    assert text in problem["detail"]


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"messages": MESSAGES}, {"tokens": [0]}])
async def test_a_model_that_nothing_is(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    path = "/detokenize" if "tokens" in body else "/tokenize"
    answer = await client.post(path, json={"model": "tersr", **body})
    assert (answer.status_code, answer.json()["field"]) == (404, "model")
    assert answer.json()["near"] == ["terse"]


async def test_bodies_are_read_strictly(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    twice = await client.post("/tokenize", content='{"inputs":"a","inputs":"b"}', headers=headers)
    assert twice.status_code == 400
    plain = await client.post("/tokenize", content='{"inputs":"a"}')
    assert plain.status_code == 415
    asked = await client.post("/tokenize?adapter=terse", json={"inputs": "a"})
    assert asked.status_code == 422
    assert "takes no adapter in its address" in asked.json()["detail"]


async def test_of_many_texts_those_beyond_a_line_of_64_are_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, go_on = TokenizerView.encode, threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> tuple[int, ...]:
        assert go_on.wait(30)
        return encode(*args, **kwargs)

    monkeypatch.setattr(TokenizerView, "encode", slowly)
    tasks = [asyncio.create_task(client.post("/tokenize", json={"prompt": "x"})) for _ in range(70)]
    await eventually(lambda: sum(task.done() for task in tasks) == 4, "four are refused")
    go_on.set()
    answers = [await task for task in tasks]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 4
    assert refused[0].json()["type"] == "/problems/queue-full"
    assert int(refused[0].headers["retry-after"]) >= 1
    assert sum(answer.status_code == 200 for answer in answers) == 66


async def test_a_long_text_holds_nobody_up(client: httpx.AsyncClient) -> None:
    long = asyncio.create_task(client.post("/tokenize", json={"inputs": "the rain " * 50_000}))
    num_answered = 0
    while not long.done():
        assert (await client.get("/health")).status_code == 200
        num_answered += 1
    assert len((await long).json()) > 100_000
    assert num_answered > 10
