"""Prefix reuse as a client sees it: the same answers, token counts and metrics."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.http_server import listening, tiny_app, tiny_config

TEMPLATE = "the rain in the town on the sea is as it was and is to be " * 3


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    config = tiny_config(tmp_path_factory.mktemp("server"))
    with (
        listening(tiny_app(config)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def complete(client: httpx.Client, prompt: str | list[int], **fields: Any) -> Any:
    body = {"model": "base", "prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def metric(client: httpx.Client, name: str) -> float:
    prefix = f"dynamic_lora_{name} "
    (line,) = (x for x in client.get("/metrics").text.splitlines() if x.startswith(prefix))
    return float(line.removeprefix(prefix))


def test_usage_and_metrics_tell_what_was_reused(client: httpx.Client) -> None:
    looked_up = metric(client, "prefix_lookup_tokens_total")
    hits = metric(client, "prefix_hit_tokens_total")
    prompt = f"{TEMPLATE} one"
    cold, warm = complete(client, prompt), complete(client, prompt)
    assert cold["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    num_prompt = warm["usage"]["prompt_tokens"]
    num_cached = warm["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert num_prompt - 16 <= num_cached < num_prompt
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
    assert metric(client, "prefix_lookup_tokens_total") - looked_up == 2 * num_prompt
    assert metric(client, "prefix_hit_tokens_total") - hits == num_cached
    assert metric(client, "prefix_blocks") >= num_prompt // 16
    assert metric(client, "prefix_evicted_blocks_total") == 0


def test_continuations_of_one_prompt_count_what_was_there_before(client: httpx.Client) -> None:
    prompt = f"two {TEMPLATE}"
    answer = complete(client, prompt, n=3)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len({choice["text"] for choice in answer["choices"]}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_details_count_them_too(client: httpx.Client, stream: bool) -> None:
    prompt = f"{stream} {TEMPLATE}"
    counts = []
    for _ in range(2):
        body = {"inputs": prompt, "parameters": {"max_new_tokens": 3, "details": True}}
        answer = client.post("/generate_stream" if stream else "/generate", json=body)
        last = answer.text.strip().rsplit("data:", 1)[-1]
        details = httpx.Response(200, text=last).json()["details"]
        counts.append((details["cached_tokens"], details["prompt_tokens"]))
    (cold, num_prompt), (warm, _) = counts
    assert cold == 0
    assert warm == (num_prompt - 1) // 16 * 16


def test_the_next_turn_finds_the_answer_before(client: httpx.Client) -> None:
    prompt = f"three {TEMPLATE}"
    ids = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    parameters = {"max_new_tokens": 40, "ignore_eos": True, "details": True}
    answer = client.post("/generate", json={"inputs": prompt, "parameters": parameters}).json()
    said = [*ids, *(token["id"] for token in answer["details"]["tokens"])]
    usage = complete(client, [*said, 5, 6, 7])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == (len(said) - 1) // 16 * 16
