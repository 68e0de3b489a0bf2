"""What needs a real socket: disconnects, peers' clients, and a queue that is full."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError
from openai import AuthenticationError, NotFoundError, OpenAI

from dynamic_lora_client import AccessDenied, AdapterNotFound, Client
from tests.support.http_server import listening, tiny_app, tiny_config

# Takes far longer than a test should: only a disconnect can end it in time.
LONG = {"max_new_tokens": 16000, "ignore_eos": True}
LONG_COMPLETION = {
    "model": "base",
    "prompt": "x",
    "max_tokens": 16000,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tiny_config(
        tmp_path_factory.mktemp("socket"),
        context_length=16384,
        kv_memory=2**25,
        max_running=2,
        max_waiting=1,
    )
    with listening(tiny_app(config)) as address:
        yield address


def num_sequences(address: str) -> tuple[float, float]:
    """How many run, and how many wait."""
    gauges = dict(line.split(" ")[:2] for line in httpx.get(f"{address}/metrics").text.splitlines())
    running, waiting = (gauges[f"dynamic_lora_{what}_sequences"] for what in ("running", "waiting"))
    return float(running), float(waiting)


def wait_for(address: str, running: int, waiting: int) -> None:
    deadline = time.monotonic() + 20
    while (found := num_sequences(address)) != (running, waiting):
        assert time.monotonic() < deadline, f"{found} run and wait"
        time.sleep(0.02)


def wait_until_idle(address: str) -> None:
    wait_for(address, 0, 0)


def test_a_streaming_client_that_goes_frees_its_place(address: str) -> None:
    body = {"inputs": "x", "parameters": LONG, "stream": True}
    with httpx.stream("POST", f"{address}/generate", json=body, timeout=30) as response:
        lines = response.iter_lines()  # dropping it would close the connection
        assert next(lines).startswith("data:")
        assert num_sequences(address) == (1, 0)
    wait_until_idle(address)


def test_a_waiting_client_that_goes_frees_its_place(address: str) -> None:
    body = LONG_COMPLETION | {"n": 2}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()  # dropping it would close the connection
        assert next(lines).startswith("data:")
        one = {"inputs": "x", "parameters": LONG}
        with httpx.stream("POST", f"{address}/generate_stream", json=one, timeout=30):
            wait_for(address, 2, 1)
        wait_for(address, 2, 0)
    wait_until_idle(address)


def test_a_client_without_a_stream_that_goes_frees_its_places(address: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/generate",
            json={"inputs": "x", "parameters": LONG | {"n": 2, "details": True}},
            timeout=httpx.Timeout(30, read=0.5),
        )
    wait_until_idle(address)


def test_a_full_queue_answers_429_and_says_when(address: str) -> None:
    body = LONG_COMPLETION | {"n": 3}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()  # dropping it would close the connection
        assert next(lines).startswith("data:")
        refused = httpx.post(f"{address}/generate", json={"inputs": "x"})
        openai = httpx.post(f"{address}/v1/completions", json={"model": "base", "prompt": "x"})
    assert refused.status_code == openai.status_code == 429
    assert refused.json()["type"] == "/problems/queue-full"
    assert int(refused.headers["retry-after"]) >= 1
    assert openai.json()["error"]["code"] == "rate_limit_exceeded"
    wait_until_idle(address)


def test_an_upload_over_the_cap_is_answered_while_it_is_sent(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_upload_bytes=10**5)
    with listening(tiny_app(config)) as address:
        response = httpx.post(
            f"{address}/adapters",
            data={"name": "big"},
            files=[("files", ("adapter.zip", b"\0" * 10**7))],
            timeout=30,
        )
        assert response.status_code == 413
        assert response.json()["type"] == "/problems/adapter-too-large"
        assert list((config.home / "staging").iterdir()) == []


def test_openais_client(address: str) -> None:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        assert chat.usage is not None
        assert chat.choices[0].logprobs is not None
        assert chat.choices[0].logprobs.content is not None
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
        turns: list[Any] = [
            {"role": "user", "content": "hi"},
            chat.choices[0].message.model_dump(),
            {"role": "user", "content": "and then?"},
        ]
        assert client.chat.completions.create(model="base", messages=turns, max_tokens=5, seed=-1)
        chunks = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            temperature=0,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == chat.choices[0].message.content
        completion = client.completions.create(model="base", prompt="hi", n=2, logprobs=1)
        assert len(completion.choices) == 2
        assert client.models.list().data[0].object == "model"
        with pytest.raises(NotFoundError, match="No adapter is named 'nope'"):
            client.completions.create(model="nope", prompt="hi")


def test_tgis_client(address: str) -> None:
    client = InferenceClient(f"{address}/generate")
    answer = client.text_generation("the rain", max_new_tokens=5, details=True, top_n_tokens=2)
    assert answer.details is not None
    assert answer.details.generated_tokens == len(answer.details.tokens)
    streamed = client.text_generation("the rain", max_new_tokens=5, stream=True, details=True)
    assert list(streamed)[-1].generated_text == answer.generated_text
    with pytest.raises(ValidationError, match="parameters.top_p"):
        client.text_generation("the rain", top_p=7.0)


def test_the_hubs_client_in_a_chat(address: str) -> None:
    client = InferenceClient(address)
    turns: list[Any] = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    chat = client.chat_completion(turns, **asked)
    turns += [chat.choices[0].message, {"role": "user", "content": "and then?"}]
    whole = client.chat_completion(turns, **asked).choices[0].message.content
    chunks = client.chat_completion(turns, **asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_official_clients_send_a_key(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, api_keys=("sk-1",), admin_keys=("sk-0",))
    with listening(tiny_app(config)) as address:
        asked = {"model": "base", "prompt": "hi", "max_tokens": 3, "temperature": 0}
        with OpenAI(base_url=f"{address}/v1", api_key="sk-1", max_retries=0) as client:
            text = client.completions.create(**asked).choices[0].text  # type: ignore[call-overload]
        with (
            OpenAI(base_url=f"{address}/v1", api_key="sk-2", max_retries=0) as client,
            pytest.raises(AuthenticationError, match="does not know this key"),
        ):
            client.completions.create(**asked)  # type: ignore[call-overload]
        hub = InferenceClient(f"{address}/generate", token="sk-1")
        assert hub.text_generation("hi", max_new_tokens=3) == text
        with Client(address, api_key="sk-1") as client:
            assert client.generate("hi", max_new_tokens=3).text == text
            with pytest.raises(AccessDenied, match="may not change adapters"):
                client.delete("ner")
        with Client(address, api_key="sk-0") as admin, pytest.raises(AdapterNotFound):
            admin.delete("ner")
