"""Which prompts are asked when, and what is made of the cells."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.errors import RequestFailed
from benchmarks.load import connect
from benchmarks.speculation import NUM_CLIENTS, Cell, main, measure, slices, summary


def test_no_prompt_is_asked_twice_and_none_is_left_out() -> None:
    prompts = [f"prompt {number}" for number in range(90)]
    warm, parts = slices(prompts)
    assert len(parts) == len(NUM_CLIENTS)
    assert len(warm) == 18
    asked = warm + [prompt for part in parts for prompt in part]
    assert sorted(asked) == sorted(prompts)
    assert [len(part) for part in parts] == sorted(len(part) for part in parts)


def cell(tokens_per_s: float, answer: str, **changes: int) -> Cell:
    counts = {"num_steps": 100, "num_drafted": 0, "num_accepted": 0} | changes
    return Cell(
        task="ner",
        num_clients=1,
        num_tokens=200,
        wall_s=200 / tokens_per_s,
        answers={"a": answer, "b": "same"},
        **counts,
    )


def test_sides_are_compared_round_by_round() -> None:
    measured = [
        {"plain": [cell(10, "x")], "drafting": [cell(30, "x", num_drafted=40, num_accepted=10)]},
        {"plain": [cell(20, "x")], "drafting": [cell(20, "y", num_steps=50)]},
    ]
    (found,) = summary(measured)
    assert [round(ratio, 6) for ratio in found["ratios"]] == [3, 1]
    assert round(found["ratio"], 6) == 2
    assert found["share_accepted"] == [0.25, 0]
    assert found["tokens_per_step"] == [2, 4]
    assert found["num_answers"] == 2
    assert found["num_answers_that_differ"] == [0, 1]


class Server:
    """Stands in for one that drafts: two tokens an answer, one step and three guesses for both."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.parameters: list[dict[str, Any]] = []

    async def metrics(self, _: web.Request) -> web.Response:
        counters = {"engine_steps": 1, "drafted_tokens": 3, "accepted_draft_tokens": 1}
        lines = [
            f"dynamic_lora_{name}_total {times * self.num_asked}\n"
            for name, times in counters.items()
        ]
        return web.Response(text="".join(lines))

    async def generate(self, request: web.Request) -> web.Response:
        self.num_asked += 1
        body = await request.json()
        prompt = body["inputs"]
        self.parameters.append(body["parameters"])
        if prompt == "refuse":
            return web.Response(status=429, text="queue full")
        texts = (None, f"{request.query['adapter']} of {prompt}")
        return web.Response(
            text="".join(f"data:{json.dumps({'generated_text': text})}\n\n" for text in texts)
        )

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        app = web.Application()
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/generate_stream", self.generate)
        async with TestServer(app) as server, connect(str(server.make_url("/"))) as http:
            yield http


async def test_a_cell_counts_what_its_own_prompts_took() -> None:
    server = Server()
    async with server.client() as http:
        await measure(http, "ner", ["warm"], 1, {})
        found = await measure(http, "ner", ["a", "b", "c"], 2, {"top_k": 1})
    assert server.parameters == [{}, *[{"top_k": 1}] * 3]
    assert found.answers == {prompt: f"ner of {prompt}" for prompt in "abc"}
    assert (found.num_tokens, found.num_steps) == (6, 3)
    assert (found.num_drafted, found.num_accepted) == (9, 3)
    assert found.tokens_per_s > 0


async def test_a_refused_prompt_ends_the_measurement() -> None:
    async with Server().client() as http:
        with pytest.raises(RequestFailed, match="status 429: queue full"):
            await measure(http, "ner", ["a", "refuse", "b"], 2, {})


async def test_a_server_without_the_counters_is_refused() -> None:
    async with TestServer(web.Application()) as server, connect(str(server.make_url("/"))) as http:
        with pytest.raises(RequestFailed, match="have no dynamic_lora_engine_steps_total, dyn"):
            await measure(http, "ner", ["a"], 1, {})


def test_data_that_is_missing_ends_the_command_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.speculation: .*wnut17/.*No such file"):
        main(["--data", str(tmp_path)])
