"""Over HTTP: greedy tokens equal PEFT's, alone and eight at a time with base rows between."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from peft import PeftModel

from dynamic_lora_client import AsyncClient, Client, Generation
from tests.support.adapters import load_with_peft, make_adapter
from tests.support.engines import ADAPTER_KINDS, peft_greedy
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama, tiny_tokenizer

NUM_TOKENS = 12
TASKS = ["attention", None, "all", "rslora", None, "down", "large", "one-layer"]
PROMPTS = [
    "the king",
    "on the other hand",
    "it is a long way to the end of the story",
    "red",
    "nothing is as it was in the beginning, and nobody remembers",
    "all the same",
    "there and back",
    "at sea",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name.replace(" ", "-"): make_adapter(root / name, tiny_llama(), **kind)
        for name, kind in ADAPTER_KINDS.items()
    }


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[str]:
    config = tiny_config(tmp_path_factory.mktemp("server"), dtype="float32")
    with listening(tiny_app(config)) as address:
        with Client(address) as client:
            for name, folder in folders.items():
                client.upload(name, folder)
        yield address


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> PeftModel:
    return load_with_peft(tiny_llama(), folders)


def expected(oracle: PeftModel, task: str | None, prompt: str) -> list[int]:
    """PEFT's greedy tokens, up to and including the end of the sequence."""
    tokenizer = tiny_tokenizer()
    tokens = peft_greedy(oracle, task, tokenizer(prompt)["input_ids"], NUM_TOKENS)
    eos = tokenizer.eos_token_id
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def token_ids(answer: Generation) -> list[int]:
    return [token.id for token in answer.tokens]


async def test_alone_and_mixed(address: str, oracle: PeftModel) -> None:
    async with AsyncClient(address) as client:

        async def ask(task: str | None, prompt: str) -> list[int]:
            return token_ids(await client.generate(prompt, adapter=task, max_new_tokens=NUM_TOKENS))

        pairs = list(zip(TASKS, PROMPTS, strict=True))
        mixed = await asyncio.gather(*(ask(*pair) for pair in pairs))
        for pair, tokens in zip(pairs, mixed, strict=True):
            assert tokens == expected(oracle, *pair), pair
            assert tokens == await ask(*pair), pair


async def test_sampled_rows_equal_the_request_alone(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=60) as http:

        async def ask(i: int) -> str:
            body = {
                "inputs": PROMPTS[i],
                "parameters": {
                    "max_new_tokens": NUM_TOKENS,
                    "temperature": 0.7 + 0.1 * i,
                    "top_p": 0.95,
                    "top_k": 50,
                    "repetition_penalty": 1.1,
                    "seed": i,
                },
            }
            task = TASKS[i]
            params = {} if task is None else {"adapter": task}
            response = await http.post("/generate", params=params, json=body)
            assert response.status_code == 200, response.text
            text: str = response.json()["generated_text"]
            return text

        together = await asyncio.gather(*(ask(i) for i in range(len(TASKS))))
        assert together == [await ask(i) for i in range(len(TASKS))]


async def test_uploads_and_deletions_under_traffic_change_no_answer(
    address: str, folders: dict[str, Path]
) -> None:
    async with AsyncClient(address) as client:

        async def ask() -> list[int]:
            return token_ids(await client.generate(PROMPTS[2], adapter="all", max_new_tokens=30))

        before = await ask()

        async def churn() -> None:
            for i in range(6):
                await client.upload(f"churn-{i}", folders["large"])
                await client.generate("a", adapter=f"churn-{i}", max_new_tokens=2)
                await client.delete(f"churn-{i}")

        answers, _ = await asyncio.gather(asyncio.gather(*(ask() for _ in range(12))), churn())
        assert answers == [before] * 12
