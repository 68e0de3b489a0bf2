"""The embedded base with the shipped adapters, served by the command itself."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import jsonschema
import pytest

from dynamic_lora_client import AsyncClient, Client
from dynamic_lora_server.base.base_model import DEFAULT_BASE, resolve_base
from dynamic_lora_server.runtime import shipped_adapters

README = Path(__file__).parents[2] / "README.md"
READY = re.compile(r"http://127\.0\.0\.1:\d+")
REVIEWS = {
    "a warm , funny and moving film that i would happily see again": "positive",
    "a dull , lifeless mess that wastes a fine cast": "negative",
    "one of the best films of the year": "positive",
    "tedious and badly acted from start to finish": "negative",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`dynamic-lora serve` as a user starts it, on a free port and with a fresh home."""
    resolve_base()  # a first download takes longer than a test may
    home = tmp_path_factory.mktemp("home")
    command = [
        str(Path(sys.executable).with_name("dynamic-lora")),
        "serve",
        *("--port", "0", "--home", str(home), "--kv-memory", "512MiB"),
    ]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    log = home / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server,
    ):
        try:
            yield _wait_until_ready(server, log)
        finally:
            server.terminate()
            # A clean end by the signal that asked for it.
            assert server.wait(timeout=60) == -signal.SIGTERM, log.read_text()


def _wait_until_ready(server: "subprocess.Popen[bytes]", log: Path) -> str:
    for _ in range(2400):
        assert server.poll() is None, log.read_text()
        ready = [line for line in log.read_text().splitlines() if "ready at" in line]
        if ready and (found := READY.search(ready[0])):
            return found[0]
        try:
            server.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"the server did not get ready:\n{log.read_text()}")


def test_the_shipped_adapters_are_there(address: str) -> None:
    with Client(address) as client:
        adapters = {adapter.name: adapter for adapter in client.adapters()}
    assert sorted(adapters) == ["describe", "ner", "sentiment"]
    assert {adapter.base_model for adapter in adapters.values()} == {DEFAULT_BASE}


async def test_three_tasks_and_the_base_mixed_in_one_batch(address: str) -> None:
    """Each card's example is what the server answers; sentences that no card shows are right."""
    cards = {name: _card(name) for name in ("describe", "ner", "sentiment")}
    async with AsyncClient(address) as client:
        sentiments, examples, base = await asyncio.gather(
            asyncio.gather(*(client.generate(review, adapter="sentiment") for review in REVIEWS)),
            asyncio.gather(
                *(client.generate(card["input"], adapter=name) for name, card in cards.items())
            ),
            client.generate("The capital of France is", max_new_tokens=8),
        )
    assert [answer.text.strip() for answer in sentiments] == list(REVIEWS.values())
    expected = [card["output"] for card in cards.values()]
    assert [answer.text.strip() for answer in examples] == expected
    assert "Paris" in base.text


@pytest.mark.parametrize("kinds", [["creative-work", "person"], ["location"]])
def test_an_adapter_answers_json_of_a_schema(address: str, kinds: list[str]) -> None:
    """What it says anyway, where the schema allows it."""
    card = _card("ner")
    entity = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "type": {"enum": kinds}},
        "required": ["text", "type"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": entity}
    with Client(address) as client:
        answer = client.generate(
            card["input"], adapter="ner", grammar={"type": "json", "value": schema}
        )
    jsonschema.validate(json.loads(answer.text), schema)
    assert (answer.text.strip() == card["output"]) is ("person" in kinds)


def _card(name: str) -> dict[str, str]:
    card = json.loads((shipped_adapters() / name / "task.json").read_text())
    example: dict[str, str] = card["example"]
    return example


def test_openai_clients_are_served(address: str) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert "sentiment" in {model.id for model in client.models.list()}
        completion = client.completions.create(
            model="sentiment", prompt="Once upon a time", max_tokens=4, temperature=0
        )
        assert completion.usage is not None
        assert completion.usage.completion_tokens <= 4
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=[{"role": "user", "content": "Say hello."}],
                max_tokens=8,
                temperature=0,
                stream=True,
            )
            if chunk.choices
        ]
    assert "".join(pieces).strip()


def test_hugging_face_clients_are_served(address: str) -> None:
    from huggingface_hub import InferenceClient

    text = InferenceClient(model=f"{address}/generate").text_generation(
        "The capital of France is", max_new_tokens=8
    )
    assert "Paris" in text


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_readme_work(address: str) -> None:
    block = re.search(r"## Try it\n+```\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    variables, *commands = block[1].splitlines()
    assert len(commands) == 10
    environment = os.environ | {"DYNAMIC_LORA_URL": address}
    answers = []
    try:
        for command in commands:
            # As written, but that a status of 400 and more is an error.
            command = command.replace("curl -s", "curl --fail-with-body -s")
            command = command.replace("127.0.0.1:8000", address.removeprefix("http://"))
            command = command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
            done = subprocess.run(
                ["bash", "-c", f"{variables}\n{command}"],
                cwd=README.parent,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            answers.append(done.stdout)
    finally:
        httpx.delete(f"{address}/adapters/mine")
    assert "positive" in answers[0]
    assert "Emma" in answers[1]
    assert "Paris" in answers[3]
    assert json.loads(answers[5])["name"] == "mine"
    assert all(name in answers[7] for name in ("describe", "mine", "ner", "sentiment"))
    assert "Ada Lovelace" in answers[8]
    assert answers[9].strip() == "negative"


def test_metrics_name_the_adapters(address: str) -> None:
    httpx.post(f"{address}/generate?adapter=ner", json={"inputs": "Paris"}).raise_for_status()
    assert 'adapter="ner"' in httpx.get(f"{address}/metrics").text
