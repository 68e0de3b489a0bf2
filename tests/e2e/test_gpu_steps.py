"""The server with a GPU's way of stepping, on a CPU: overlapping steps, some of fixed shape."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedModel

from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from tests.support.adapters import make_adapter
from tests.support.eventually import eventually
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama

PROMPTS = ("the rain", "the king is in the town", "a", "the sea and the rain")


def _as_on_a_gpu(model: PreTrainedModel, *, options: EngineOptions, **rest: Any) -> BuiltEngine:
    wanted = replace(options, paged=True, decode_graphs=True, overlap=True, speculate=0)
    return build_engine(model, options=wanted, **rest)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two servers of one base: as on a CPU, and as on a GPU."""
    folders = [tmp_path_factory.mktemp(name) for name in ("cpu", "gpu")]
    with (
        listening(tiny_app(tiny_config(folders[0]))) as plain,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("dynamic_lora_server.runtime.build_engine", _as_on_a_gpu)
        with listening(tiny_app(tiny_config(folders[1]))) as overlapping:
            yield [plain, overlapping]


@pytest.fixture
async def clients(addresses: list[str], tmp_path: Path) -> AsyncIterator[list[httpx.AsyncClient]]:
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=4)
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    both = [httpx.AsyncClient(base_url=address, timeout=60) for address in addresses]
    for client in both:
        response = await client.post("/adapters", data={"name": "ner"}, files=files)
        assert response.status_code == 201, response.text
    yield both
    for client in both:
        await client.delete("/adapters/ner")
        await client.aclose()


async def generate(client: httpx.AsyncClient, prompt: str, **fields: Any) -> Any:
    adapter = fields.pop("adapter", None)
    parameters = {"max_new_tokens": 12, "ignore_eos": True, "details": True, **fields}
    response = await client.post(
        "/generate",
        params={} if adapter is None else {"adapter": adapter},
        json={"inputs": prompt, "parameters": parameters},
    )
    assert response.status_code == 200, response.text
    return response.json()


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("dynamic_lora_"))
    return {name.removeprefix("dynamic_lora_"): float(value) for name, value in pairs}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_sample": True, "seed": 7, "temperature": 2.0},
        {"repetition_penalty": 1.3},
        {"stop": ["e"]},
    ],
    ids=str,
)
async def test_mixed_traffic_gets_the_same_answers(
    clients: list[httpx.AsyncClient], fields: dict[str, Any]
) -> None:
    answers = []
    for client in clients:
        wanted = [
            generate(client, prompt, adapter=adapter, **fields)
            for prompt in PROMPTS
            for adapter in (None, "ner")
        ]
        answers.append([answer["generated_text"] for answer in await asyncio.gather(*wanted)])
    assert answers[0] == answers[1]
    assert any(answers[0])


async def test_the_metrics_tell_how_steps_ran(clients: list[httpx.AsyncClient]) -> None:
    plain, overlapping = clients
    before = await metrics(overlapping)
    await generate(overlapping, "the rain")
    after = await metrics(overlapping)
    # One prompt and eleven decoding steps, each started while the one before was unread.
    assert after["engine_steps_total"] - before["engine_steps_total"] == 12
    assert after["overlapped_steps_total"] - before["overlapped_steps_total"] == 11
    assert after["graph_steps_total"] - before["graph_steps_total"] == 11
    prompts = 'graph_declined_steps_total{reason="prompts"}'
    assert after[prompts] - before.get(prompts, 0) == 1
    await generate(plain, "the rain")
    assert (await metrics(plain))["overlapped_steps_total"] == 0
    assert not any("graph" in name for name in await metrics(plain))


async def test_clients_that_leave_free_their_places(clients: list[httpx.AsyncClient]) -> None:
    _, client = clients
    for _ in range(5):
        body = {"inputs": "the rain", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
        async with client.stream("POST", "/generate_stream?adapter=ner", json=body) as response:
            line = await anext(response.aiter_lines())
            assert "token" in json.loads(line.removeprefix("data:"))

    async def idle() -> bool:
        return not (await metrics(client))["running_sequences"]

    await eventually(idle, "no sequence runs")
    now = await metrics(client)
    assert now["adapters_in_use"] == 0
    assert now["kv_used_tokens"] == now["kv_reserved_tokens"] == 0
    assert (await client.get("/health")).status_code == 200
