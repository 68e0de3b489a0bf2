"""The whole API on a real engine with a tiny base model."""

import asyncio
import io
import json
import logging
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_adapters.files.template_process import TemplateProcesses
from dynamic_lora_server.requests import chat_template
from dynamic_lora_server.serving.adapter_loader import AdapterLoader
from dynamic_lora_server.tools import template as template_trials
from tests.support.adapters import make_adapter
from tests.support.eventually import eventually
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama, tiny_tokenizer

CARD = {
    "description": "Echo",
    "prompt_template": "Text: {input}\nAnswer:",
    "parameters": {"max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_adapter(tmp_path_factory.mktemp("adapter"), tiny_llama(), rank=4)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"task.json": json.dumps(CARD).encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with listening(tiny_app(tiny_config(folder, max_upload_bytes=10**5))) as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[httpx.AsyncClient]:
    """Each test begins and ends without adapters."""
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        yield client
        for adapter in (await client.get("/adapters")).json()["adapters"]:
            await client.delete(f"/adapters/{adapter['name']}")


async def upload(
    client: httpx.AsyncClient, name: str, files: dict[str, bytes], **fields: str
) -> httpx.Response:
    parts = [("files", (filename, content)) for filename, content in files.items()]
    return await client.post("/adapters", data={"name": name, **fields}, files=parts)


async def generate(client: httpx.AsyncClient, *, adapter: str | None = None, **body: Any) -> Any:
    params = {} if adapter is None else {"adapter": adapter}
    response = await client.post("/generate", params=params, json={"inputs": "the rain", **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_the_life_of_an_adapter(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    created = await upload(client, "ner", adapter_files)
    assert created.status_code == 201, created.text
    assert created.headers["location"] == "/adapters/ner"
    passport = created.json()
    assert (passport["kind"], passport["rank"]) == ("lora", 4)
    assert passport["card"]["description"] == "Echo"
    assert passport["residency"] == {"tier": "disk", "mode": "bypass", "num_merges": 0}

    again = await upload(client, "ner", adapter_files)
    assert (again.status_code, again.json()) == (200, passport)

    answer = await client.post("/generate?adapter=ner", json={"inputs": "the rain"})
    assert answer.headers["x-adapter"] == "ner"
    assert answer.headers["x-adapter-version"] == passport["version"]
    assert (await client.get("/adapters/ner")).json()["residency"]["tier"] == "device"
    assert [a["name"] for a in (await client.get("/adapters")).json()["adapters"]] == ["ner"]

    assert (await client.delete("/adapters/ner")).status_code == 204
    gone = await client.post("/generate?adapter=ner", json={"inputs": "the rain"})
    assert gone.status_code == 404
    assert (await client.delete("/adapters/ner")).status_code == 404


async def test_an_adapter_from_an_archive_and_from_a_folder(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes], folder: Path
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in adapter_files.items():
            archive.writestr(f"ner/{name}", content)
    by_archive = await upload(client, "zipped", {"ner.zip": packed.getvalue()})
    assert by_archive.status_code == 201, by_archive.text
    source = folder / "on-disk"
    source.mkdir()
    for name, content in adapter_files.items():
        (source / name).write_bytes(content)
    by_path = await client.post("/adapters", json={"name": "local", "source": "on-disk"})
    assert by_path.status_code == 201, by_path.text
    assert by_path.json()["version"] == by_archive.json()["version"]


async def test_the_card_wraps_the_prompt_unless_raw(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "ner", adapter_files)
    prompt = "Text: the rain\nAnswer:"
    carded = await generate(client, adapter="ner", parameters={"details": True})
    assert carded["details"]["generated_tokens"] == 4
    raw = await generate(
        client, adapter="ner", inputs=prompt, raw=True, parameters={"max_new_tokens": 4}
    )
    assert raw["generated_text"] == carded["generated_text"]
    full = await generate(client, adapter="ner", parameters={"return_full_text": True})
    assert full["generated_text"] == prompt + carded["generated_text"]
    by_id = await generate(client, parameters={"adapter_id": "ner"})
    assert by_id == full | {"generated_text": carded["generated_text"]}


@pytest.mark.parametrize("chats", [False, True])
async def test_a_prompt_is_rendered_as_the_version_wants_that_answers(
    client: httpx.AsyncClient,
    adapter_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    chats: bool,
) -> None:
    """Also where the adapter is replaced just before it is leased."""
    longer = {**CARD, "prompt_template": "Another text, a longer one: {input}\nAnswer:"}
    card = {"task.json": json.dumps(longer).encode()}
    template = {"chat_template.jinja": b"{{ messages[0].content }} and nothing else"}
    newer = adapter_files | (template if chats else card)
    messages = [{"role": "user", "content": "the rain"}]
    asked = {
        "/v1/chat/completions": {"model": "echo", "messages": messages, "temperature": 0},
        "/generate?adapter=echo": {
            "inputs": "the rain",
            "parameters": {"return_full_text": True},
        },
    }

    async def ask() -> tuple[Any, str | None]:
        path = list(asked)[0 if chats else 1]
        answer = await client.post(path, json=asked[path])
        assert answer.status_code == 200
        document = answer.json()
        told = (document["usage"]["prompt_tokens"], document["choices"]) if chats else document
        return told, answer.headers.get("x-adapter-version")

    await upload(client, "echo", newer)
    expected = await ask()
    await upload(client, "echo", adapter_files)
    hold = AdapterLoader.hold
    replaced: list[httpx.Response] = []

    @asynccontextmanager
    async def late(self: AdapterLoader, adapter: Any, *waiting: Any) -> AsyncIterator[Any]:
        if not replaced:  # here on the server's event loop
            async with httpx.AsyncClient(base_url=client.base_url) as other:
                replaced.append(await upload(other, "echo", newer))
        async with hold(self, adapter, *waiting) as held:
            yield held

    monkeypatch.setattr(AdapterLoader, "hold", late)
    assert await ask() == expected
    assert replaced[0].status_code == 201


async def test_adapter_and_base_differ_and_a_mixed_batch_does_not_mix_them(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "ner", adapter_files)
    parameters = {"max_new_tokens": 12}
    alone = {
        name: await generate(client, adapter=name, raw=True, parameters=parameters)
        for name in ("ner", "base")
    }
    assert alone["ner"] != alone["base"]
    names = ["ner", "base"] * 4
    mixed = await asyncio.gather(
        *(generate(client, adapter=name, raw=True, parameters=parameters) for name in names)
    )
    assert mixed == [alone[name] for name in names]


async def test_the_log_names_who_answered(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    await upload(client, "ner", adapter_files)
    bodies = {
        "/generate?adapter=ner": {"inputs": "x", "stream": True},
        "/v1/completions": {"model": "base", "prompt": "x"},
        "/v1/chat/completions": {"model": "nre", "messages": [{"role": "user", "content": "x"}]},
    }
    with caplog.at_level(logging.INFO, "dynamic_lora_server.http.access_log"):
        answers = [await client.post(path, json=body) for path, body in bodies.items()]
        ids = [answer.headers["x-request-id"] for answer in answers]
        # An answer is there a moment before its line.
        await eventually(lambda: all(one in caplog.text for one in ids), "all are logged")
    lines = dict(record.getMessage().split(" request=")[::-1] for record in caplog.records)
    for one, adapter in zip(ids, ("ner", "base", "-"), strict=True):
        assert lines[one].endswith(f"s adapter={adapter}")


async def test_details(client: httpx.AsyncClient) -> None:
    parameters = {"max_new_tokens": 3, "details": True, "top_n_tokens": 2, "ignore_eos": True}
    details = (await generate(client, parameters=parameters))["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 3
    assert details["prompt_tokens"] == len(tiny_tokenizer().encode("the rain"))
    assert details["prefill"] == []
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert top[0]["id"] == token["id"]  # greedy
        assert top[0]["logprob"] == token["logprob"] >= top[1]["logprob"]


async def test_several_continuations_and_seeds(client: httpx.AsyncClient) -> None:
    parameters = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5, "n": 3, "details": True}
    details = (await generate(client, parameters=parameters))["details"]
    seeds = [details["seed"], *(other["seed"] for other in details["best_of_sequences"])]
    assert seeds == [5, 6, 7]
    second = await generate(client, parameters={"max_new_tokens": 6, "temperature": 1.0, "seed": 6})
    assert second["generated_text"] == details["best_of_sequences"][0]["generated_text"]


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
async def test_a_stream_says_what_the_answer_says(client: httpx.AsyncClient, route: str) -> None:
    parameters = {"max_new_tokens": 8, "details": True}
    whole = await generate(client, parameters=parameters)
    body = {"inputs": "the rain", "parameters": parameters, "stream": route == "/generate"}
    response = await client.post(route, json=body)
    assert response.headers["x-adapter"] == "base"
    streamed = events(response)
    assert "".join(event["token"]["text"] for event in streamed) == whole["generated_text"]
    assert [e["token"]["id"] for e in streamed] == [t["id"] for t in whole["details"]["tokens"]]
    assert streamed[-1]["generated_text"] == whole["generated_text"]
    assert streamed[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"]
    assert all(event["generated_text"] is None for event in streamed[:-1])


async def test_a_stop_string_ends_the_text_before_it(client: httpx.AsyncClient) -> None:
    parameters = {"max_new_tokens": 12, "ignore_eos": True}
    text = (await generate(client, parameters=parameters))["generated_text"]
    stop = text[3:5]
    stopped = await generate(client, parameters=parameters | {"stop": [stop], "details": True})
    assert stopped["generated_text"] == text[: text.index(stop)]
    assert stopped["details"]["finish_reason"] == "stop_sequence"


async def test_completions_equal_generate(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "ner", adapter_files)
    expected = await generate(client, adapter="ner", raw=True, parameters={"max_new_tokens": 5})
    ids = tiny_tokenizer().encode("the rain")
    for prompt in ("the rain", ids):
        body = {"model": "ner", "prompt": prompt, "max_tokens": 5, "temperature": 0}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == expected["generated_text"]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        streamed = events(await client.post("/v1/completions", json=body | {"stream": True}))
        assert streamed.pop() == "[DONE]"
        assert "".join(c["choices"][0]["text"] for c in streamed) == expected["generated_text"]


async def test_several_prompts_and_continuations(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": ["a", "b"], "n": 2, "max_tokens": 3, "seed": 1}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2
    streamed = events(await client.post("/v1/completions", json=body | {"stream": True}))
    texts = dict.fromkeys(range(4), "")
    for chunk in streamed[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == [choice["text"] for choice in answer["choices"]]


async def test_chat(client: httpx.AsyncClient, adapter_files: dict[str, bytes]) -> None:
    await upload(client, "ner", adapter_files)
    expected = await generate(
        client,
        adapter="ner",
        inputs="[user] hi\n[assistant]",
        raw=True,
        parameters={"max_new_tokens": 5},
    )
    body = {
        "model": "ner",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 5,
        "temperature": 0,
    }
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == expected["generated_text"]
    streamed = events(
        await client.post(
            "/v1/chat/completions",
            json=body | {"stream": True, "stream_options": {"include_usage": True}},
        )
    )
    assert streamed.pop() == "[DONE]"
    assert streamed.pop()["usage"] == answer["usage"]
    prints = {chunk["system_fingerprint"] for chunk in (answer, *streamed)}
    assert len(prints) == 1
    completion = await client.post("/v1/completions", json={"model": "ner", "prompt": "hi"})
    assert prints == {completion.json()["system_fingerprint"]}
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
    assert "".join(d.get("content", "") for d in deltas) == expected["generated_text"]


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
)


async def test_an_adapter_whose_template_has_no_end_is_named(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = "{% for a in range(99999) %}"
    template = (many * 3 + "{% endfor %}" * 3).encode()
    created = await upload(client, "endless", adapter_files | {"chat_template.jinja": template})
    assert created.status_code == 201, created.text
    processes = TemplateProcesses(seconds=0.1)
    monkeypatch.setattr(chat_template, "PROCESSES", processes)
    monkeypatch.setattr(template_trials, "PROCESSES", processes)
    messages = [{"role": "user", "content": "hi"}]
    chat = await client.post(
        "/v1/chat/completions", json={"model": "endless", "messages": messages, "max_tokens": 1}
    )
    assert chat.status_code == 400
    assert "chat template of 'endless' was stopped" in chat.json()["error"]["message"]
    tokens = await client.post("/tokenize", json={"model": "endless", "messages": messages})
    assert (tokens.status_code, tokens.json()["field"]) == (422, "messages")
    assert "again in" in tokens.json()["fix"]
    others = await client.post("/tokenize", json={"model": "base", "messages": messages})
    assert others.status_code == 200
    processes.close()
    await client.delete("/adapters/endless")


async def test_an_adapter_chats_by_its_own_template(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    tokenizer = json.dumps({"eos_token": "[end]", "chat_template": TEMPLATE}).encode()
    created = await upload(client, "own", adapter_files | {"tokenizer_config.json": tokenizer})
    assert created.status_code == 201, created.text
    passport = (await client.get("/adapters/own")).json()
    assert (passport["chat_template"], passport["end_tokens"]) == (True, ["[end]"])
    assert passport["ignored_files"] == ["README.md"]
    await upload(client, "plain", adapter_files)

    async def chat(model: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        answer = await client.post("/v1/chat/completions", json=body | {"temperature": 0})
        return str(answer.json()["choices"][0]["message"]["content"])

    async def told(adapter: str, prompt: str) -> str:
        body = {"inputs": prompt, "raw": True, "parameters": {"max_new_tokens": 5}}
        answer = await client.post("/generate", params={"adapter": adapter}, json=body)
        return str(answer.json()["generated_text"])

    own, base = "<user>hi[end]<assistant>", "[user] hi\n[assistant]"
    assert await chat("own") == await told("own", own) != await told("own", base)
    assert await chat("own*0.5") == await told("own*0.5", own)
    assert await chat("plain") == await told("plain", base)
    assert await chat("own*0.5+plain*0.5") == await told("own*0.5+plain*0.5", base)
    assert await chat("base") == await told("base", base)


async def test_an_adapters_end_token_ends_its_answers(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "endless", adapter_files)

    tokenizer = tiny_tokenizer()
    parameters = {"max_new_tokens": 8, "details": True}

    async def details(adapter: str) -> Any:
        answer = await generate(client, adapter=adapter, raw=True, parameters=parameters)
        details = answer["details"]
        ids = [token["id"] for token in details["tokens"]]
        # The end token is one of the answer's tokens, but no part of its text.
        shown = ids[:-1] if details["finish_reason"] == "eos_token" else ids
        assert answer["generated_text"] == tokenizer.decode(shown)
        return details

    free = [token["id"] for token in (await details("endless"))["tokens"]]
    assert len(free) == 8
    config = json.dumps({"eos_token_id": [free[3], 10**6]}).encode()
    await upload(client, "ended", adapter_files | {"generation_config.json": config})
    ended = await details("ended")
    assert ended["finish_reason"] == "eos_token"
    assert [token["id"] for token in ended["tokens"]] == free[: free.index(free[3]) + 1]
    assert ended["tokens"][-1]["text"] == tokenizer.decode(free[3])
    streamed = events(
        await client.post(
            "/generate_stream",
            params={"adapter": "ended", "raw": True},
            json={"inputs": "the rain", "parameters": parameters},
        )
    )
    texts = [event["token"]["text"] for event in streamed]
    assert "".join(texts) == streamed[-1]["generated_text"]
    assert (streamed[-1]["token"]["id"], texts[-1]) == (free[3], "")
    token = tokenizer.convert_ids_to_tokens(free[3])
    config = json.dumps({"eos_token": token}).encode()
    await upload(client, "ended", adapter_files | {"tokenizer_config.json": config})
    assert (await details("ended"))["tokens"] == ended["tokens"]
    assert (await details("ended*0.5+endless*0.5"))["finish_reason"] == "length"


@pytest.mark.parametrize("chats", [True, False])
async def test_a_client_that_names_no_model(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes], chats: bool
) -> None:
    path = "/v1/chat/completions" if chats else "/v1/completions"
    text = {"messages": [{"role": "user", "content": "hi"}]} if chats else {"prompt": "hi"}
    body = {**text, "max_tokens": 5, "temperature": 0}

    async def ask(model: str) -> Any:
        (choice,) = (await client.post(path, json=body | {"model": model})).json()["choices"]
        return choice["message"]["content"] if chats else choice["text"]

    assert await ask("tgi") == await ask("dummy") == await ask("base")
    await upload(client, "tgi", adapter_files)
    await upload(client, "ner", adapter_files)
    assert await ask("tgi") == await ask("ner") != await ask("base")


async def test_a_limit_that_nobody_asked_for_refuses_nothing(client: httpx.AsyncClient) -> None:
    """500 tokens of the context's 512 are the prompt."""
    left = 12
    details = await generate(
        client, inputs="x " * 250, parameters={"details": True, "ignore_eos": True}
    )
    assert details["details"]["prompt_tokens"] == 512 - left
    assert details["details"]["generated_tokens"] == left
    body = {"model": "base", "prompt": "x " * 250, "ignore_eos": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["usage"]["completion_tokens"] == left
    assert answer["choices"][0]["finish_reason"] == "length"
    refused = await client.post("/v1/completions", json=body | {"max_tokens": 16})
    assert refused.status_code == 400
    assert "up to 16 new ones are asked for" in refused.json()["error"]["message"]


async def test_models_info_and_metrics(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes], folder: Path
) -> None:
    version = (await upload(client, "ner", adapter_files)).json()["version"]
    await generate(client, adapter="ner")
    base, ner = (await client.get("/v1/models")).json()["data"]
    assert base["id"] == str(folder / "base")
    assert (ner["id"], ner["root"], ner["parent"]) == ("ner", version, base["id"])
    assert (await client.get("/v1/models/ner")).json() == ner
    assert (await client.get("/v1/models/base")).json() == base
    assert (await client.get("/v1/models/nre")).json()["error"]["code"] == "model_not_found"
    info = (await client.get("/info")).json()
    assert (info["max_total_tokens"], info["num_adapters"]) == (512, 1)
    assert info["model_origin"] == "local folder"
    metrics = (await client.get("/metrics")).text
    assert 'dynamic_lora_generated_tokens_total{adapter="ner"}' in metrics
    assert 'dynamic_lora_adapter_resident{adapter="ner"} 1.0' in metrics
    assert 'route="/generate",status="200"' in metrics


def body_of(**fields: Any) -> dict[str, Any]:
    return {"json": {"inputs": "x", **fields}}


BAD: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("/generate", body_of(inputs=""), 422, "at least 1 character", "inputs"),
    (
        "/generate",
        body_of(parameters={"temperature": -1}),
        422,
        "greater than or equal to 0",
        "parameters.temperature",
    ),
    ("/generate", body_of(colour=1), 422, "colour: is not a field", "colour"),
    ("/generate?adaptr=ner", body_of(), 422, "adaptr: is not a field", "adaptr"),
    ("/generate?adapter=a", body_of(parameters={"adapter_id": "b"}), 422, "'a'", "adapter"),
    ("/generate?adapter=nre", body_of(), 404, "No adapter is named 'nre'", "adapter"),
    ("/generate", body_of(inputs="x " * 600), 422, "context holds 512", "inputs"),
    (
        "/generate",
        body_of(parameters={"max_new_tokens": 512}),
        422,
        "the context holds 512",
        "parameters.max_new_tokens",
    ),
    ("/generate", {"content": b'{"inputs":'}, 400, "The body is not JSON", None),
    ("/generate", {"content": b'{"inputs":"\xff"}'}, 400, "not UTF-8", None),
    ("/generate", {"content": b'{"inputs":"\\ud800"}'}, 422, "half of a character", "inputs"),
    (
        "/generate?adapter=base",
        {"content": b'{"inputs":"x","parameters":{"adapter_id":"\\ud800"}}'},
        422,
        "half of a character",
        "parameters.adapter_id",
    ),
    ("/generate", {"content": b"[" * 10**5}, 400, "The body is nested too deeply", None),
    ("/generate", {"content": b'{"inputs":"a","inputs":"b"}'}, 400, "'inputs' appears twice", None),
    (
        "/",
        {"content": b'{"inputs":"a","parameters":{"seed":1,"seed":2}}'},
        400,
        "The body can be read in two ways: the key 'seed' appears twice",
        None,
    ),
    (
        "/generate_stream",
        {"content": b'{"inputs":"a","parameters":{"seed":1%s}}' % (b"0" * 5000)},
        400,
        "The body holds an integer with too many digits",
        None,
    ),
    (
        "/generate",
        body_of(parameters={"top_k": 10**400, "do_sample": True}),
        422,
        "top_k must lie between 0 (off) and 2147483647",
        "parameters.top_k",
    ),
    ("/generate?raw=1&raw=0", body_of(), 422, "raw is given more than once", "raw"),
    ("/generate?adapter=", body_of(), 422, "?adapter= is empty", "adapter"),
    (
        "/adapters",
        {"content": b'{"name":"a","name":"b","source":"x"}'},
        400,
        "the key 'name' appears twice",
        None,
    ),
    ("/generate", {"json": []}, 422, "", None),
    ("/generate", {"json": {"inputs": "x"}, "type": "text/plain"}, 415, "text/plain", None),
    ("/adapters", {"content": b"x", "type": "text/plain"}, 415, "multipart/form-data", None),
    ("/adapters", {"content": b"x", "type": "multipart/form-data"}, 400, "no boundary", None),
    ("/adapters", {"content": b"{"}, 400, "The body is not JSON", None),
    ("/adapters", {"json": {"name": "a", "source": "/etc"}}, 422, "not below", "source"),
    ("/adapters", {"json": {"name": "a", "source": "x", "y": 1}}, 422, "not a field", "y"),
]


@pytest.mark.parametrize(("path", "request_", "status", "text", "field"), BAD)
async def test_bad_requests_are_problems(
    client: httpx.AsyncClient,
    path: str,
    request_: dict[str, Any],
    status: int,
    text: str,
    field: str | None,
) -> None:
    content_type = request_.get("type", "application/json")
    options = {key: value for key, value in request_.items() if key != "type"}
    response = await client.post(path, headers={"content-type": content_type}, **options)
    problem = response.json()
    assert response.status_code == problem["status"] == status, problem
    assert response.headers["content-type"] == "application/problem+json"
    assert text in problem["detail"]
    if field is not None:
        assert problem["field"] == field
    assert (await client.post("/generate", json={"inputs": "x"})).status_code == 200


PICKLED: dict[str, bytes | None] = {
    "adapter_model.bin": b"x",
    "adapter_model.safetensors": None,
}


@pytest.mark.parametrize(
    ("name", "changes", "status", "slug", "text"),
    [
        ("Bad Name", {}, 422, "invalid-adapter-name", "cannot be an adapter's name"),
        ("base", {}, 422, "invalid-adapter-name", "means the base model"),
        ("a", {"adapter_config.json": b"{"}, 422, "invalid-adapter", "adapter_config.json"),
        ("a", {"adapter_config.json": None}, 422, "invalid-adapter", "adapter_config.json"),
        ("a", PICKLED, 422, "unsafe-archive", "pickle"),
        ("a", {"other.txt": b"x"}, 422, "invalid-adapter", "other.txt"),
        ("a", {"chat_template.jinja": b"{% if %}"}, 422, "invalid-adapter", "chat template"),
        ("a", {"big.zip": b"x" * 200_000}, 413, "adapter-too-large", "larger than 100,000"),
    ],
)
async def test_bad_uploads_are_problems_and_leave_nothing(
    client: httpx.AsyncClient,
    adapter_files: dict[str, bytes],
    name: str,
    changes: dict[str, bytes | None],
    status: int,
    slug: str,
    text: str,
) -> None:
    changed = adapter_files | changes
    files = {filename: content for filename, content in changed.items() if content is not None}
    response = await upload(client, name, files)
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"/problems/{slug}"), problem
    assert text in problem["detail"]
    assert (await client.get("/adapters")).json()["adapters"] == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are Unix's")
async def test_a_disk_that_takes_no_more_is_told_and_changes_nothing(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        refused = await upload(client, "ner", adapter_files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.status_code == 507
    assert refused.json()["type"] == "/problems/store-failed"
    assert "File too large" in refused.json()["detail"]
    assert (await client.get("/adapters")).json()["adapters"] == []
    assert (await upload(client, "ner", adapter_files)).status_code == 201


async def test_an_adapter_of_another_model_needs_force(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    config = json.loads(adapter_files["adapter_config.json"])
    config["base_model_name_or_path"] = "org/other"
    files = adapter_files | {"adapter_config.json": json.dumps(config).encode()}
    response = await upload(client, "forced", files, force="true")
    assert response.status_code == 201, response.text
    assert (await client.delete("/adapters/forced")).status_code == 204


async def test_clients_that_know_the_address_alone(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    """LoRAX's and TGI's own clients post to the root and read a list of one."""
    await upload(client, "ner", adapter_files)
    body = {"inputs": "the rain", "parameters": {"adapter_id": "ner", "details": True}}
    whole = await client.post("/", json=body)
    assert whole.status_code == 200, whole.text
    assert whole.headers["x-adapter"] == "ner"
    named = await client.post("/generate", json=body)
    assert [named.json()["generated_text"]] == [a["generated_text"] for a in whole.json()]
    streamed = await client.post("/", json={**body, "stream": True})
    assert events(streamed)[-1]["generated_text"] == named.json()["generated_text"]
    refused = await client.post("/", json={"inputs": "x", "parameters": {"adapter_id": "nre"}})
    assert refused.status_code == 404
    assert refused.json()["error"].startswith("No adapter is named 'nre'. Did you mean 'ner'?")


async def test_the_mode_of_an_adapter_is_told(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "ner", adapter_files)
    body = {"inputs": "the rain", "parameters": {"details": True, "max_new_tokens": 4}}
    base = (await client.post("/generate", json=body)).json()
    assert base["details"]["mode"] == "base"
    served = (await client.post("/generate", params={"adapter": "ner"}, json=body)).json()
    assert served["details"]["mode"] in {"bypass", "merged", "both"}
    modes = (await client.get("/adapters")).json()["modes"]
    assert modes["mode"] == "auto"
    assert modes["num_base_tokens"] > 0
    assert modes["num_bypass_tokens"] + modes["num_merged_tokens"] > 0
    assert modes["drift"] == 0
    metrics = (await client.get("/metrics")).text
    for name in ("mode_switches_total", "merged_tokens_total", "bypass_tokens_total"):
        assert f"dynamic_lora_{name}" in metrics


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_key_that_comes_twice_is_refused_in_openais_shape(
    client: httpx.AsyncClient, path: str
) -> None:
    body = b'{"model":"base","model":"ner","prompt":"x"}'
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "the key 'model' appears twice" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ude00"}]}]},
            "messages.0.content",
        ),
        ({"stop": "\ud83d"}, "stop"),
        ({"stop": ["x", "\ud83d"]}, "stop"),
        ({"model": "ner\ud83d"}, "model"),
        ({"user": "\ud83d"}, "user"),
    ],
)
async def test_half_a_character_in_a_chat_is_the_clients_fault(
    client: httpx.AsyncClient, changes: dict[str, Any], param: str
) -> None:
    """JavaScript sends one where it cuts an emoji in two."""
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    answer = await client.post(
        "/v1/chat/completions",
        content=json.dumps(body | changes),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert "half of a character" in error["message"]


async def test_more_continuations_than_the_server_ever_takes(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": ["a", "b"], "n": 21, "max_tokens": 1}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert "42 continuations; the server takes 40 at a time" in answer.json()["error"]["message"]


async def test_two_adapters_in_one_address_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate?adapter=a&adapter=b", json={"inputs": "x"})
    assert answer.status_code == 422
    assert answer.json()["field"] == "adapter"
    assert "more than once" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("POST", "/v1/completions", 400),
        ("POST", "/v1/chat/completions", 400),
        ("GET", "/v1/models", 400),
        ("GET", "/v1/models/base", 400),
        ("GET", "/adapters", 422),
        ("POST", "/adapters", 422),
        ("GET", "/adapters/ner", 422),
        ("DELETE", "/adapters/ner", 422),
        ("GET", "/compositions", 422),
        ("GET", "/compositions/both", 422),
        ("PUT", "/compositions/both", 422),
        ("DELETE", "/compositions/both", 422),
        ("GET", "/info", 422),
        ("POST", "/tokenize", 422),
        ("POST", "/detokenize", 422),
    ],
)
async def test_a_wish_in_an_address_that_takes_none_is_refused(
    client: httpx.AsyncClient, method: str, route: str, status: int
) -> None:
    response = await client.request(method, route, params={"adapter": "ner"}, json={})
    assert response.status_code == status
    assert f"{route} takes no adapter in its address" in response.text


@pytest.mark.parametrize(
    ("method", "route", "fix"),
    [
        ("GET", "/adapters", "Leave it out."),
        ("DELETE", "/adapters/ner", "Leave it out."),
        ("PUT", "/compositions/both", "Send it in the body, if it is a field of that."),
        ("POST", "/tokenize", "Below /v1, the field model of the body names the adapter."),
    ],
)
async def test_who_wishes_in_an_address_is_told_where_to_wish(
    client: httpx.AsyncClient, method: str, route: str, fix: str
) -> None:
    response = await client.request(method, route, params={"adapter": "ner"}, json={})
    assert response.json()["fix"] == fix


async def test_what_an_address_wishes_of_a_deletion_deletes_nothing(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "ner", adapter_files)
    assert (await client.delete("/adapters/ner?dry_run=true")).status_code == 422
    assert (await client.get("/adapters/ner")).status_code == 200


async def test_null_is_the_same_as_nothing(client: httpx.AsyncClient) -> None:
    body = {"inputs": "the rain", "parameters": None, "stream": None, "raw": None}
    answer = await client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    plain = await client.post("/generate", json={"inputs": "the rain"})
    assert answer.json() == plain.json()


async def test_deleted_adapters_leave_the_metrics(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    await upload(client, "ner", adapter_files)
    await generate(client, adapter="ner")
    assert 'adapter="ner"' in (await client.get("/metrics")).text
    await client.delete("/adapters/ner")
    assert 'adapter="ner"' not in (await client.get("/metrics")).text


async def test_an_adapter_at_a_fixed_version_counts_under_its_name(
    client: httpx.AsyncClient, adapter_files: dict[str, bytes]
) -> None:
    version = (await upload(client, "pinned", adapter_files)).json()["version"]
    await generate(
        client,
        adapter=f"pinned@{version[:8]}",
        parameters={"max_new_tokens": 3, "ignore_eos": True},
    )
    metrics = (await client.get("/metrics")).text
    assert 'dynamic_lora_generated_tokens_total{adapter="pinned"} 3.0' in metrics
