"""The quality measurement against a stand-in server."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from benchmarks import quality
from dynamic_lora_server.training import load_config

CARD: dict[str, Any] = {"prompt_template": "Review: {input}\nSentiment:"}
RECIPE = quality.RECIPES / "sentiment.yaml"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two dev sentences, and a shipped adapter with a small card."""
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dev.tsv").write_text("good one\t1\nbad one\t0\n", encoding="utf-8")
    card = tmp_path / "shipped" / "sentiment" / "task.json"
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps(CARD), encoding="utf-8")
    monkeypatch.setattr(quality, "SHIPPED", tmp_path / "shipped")
    return tmp_path


def answer(request: httpx.Request) -> httpx.Response:
    """The adapter reads the bare sentence rightly; the base says the same to every prompt."""
    body = json.loads(request.content)
    if request.url.params.get("adapter") == "sentiment":
        text = {"good one": " positive", "bad one": " negative"}[body["inputs"]]
    else:
        assert body["inputs"].startswith("Review: ")
        assert body["parameters"] == {"max_new_tokens": 4, "stop": ["\n"]}
        text = " positive"
    return httpx.Response(200, json={"generated_text": text})


async def measure(data: Path, limit: int | None = None) -> quality.TaskQuality:
    """Measure `sentiment` against the stand-in."""
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await quality.measure(client, "sentiment", load_config(RECIPE), data, limit, 4)


async def test_adapter_and_base_are_scored(data: Path) -> None:
    found = await measure(data)
    assert found.adapter == {"accuracy": 1.0}
    assert found.base == {"accuracy": 0.5}
    assert (await measure(data, limit=1)).num_examples == 1


async def test_figures_go_into_the_card(data: Path) -> None:
    quality.write_card(await measure(data))
    card = json.loads((data / "shipped" / "sentiment" / "task.json").read_text(encoding="utf-8"))
    assert card == {
        **CARD,
        "metrics": {"accuracy": 1.0, "base_accuracy": 0.5, "num_examples": 2},
    }


async def test_an_error_answer_ends_the_measurement(data: Path) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(404))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            await quality.measure(client, "sentiment", load_config(RECIPE), data, None, 4)


def test_an_adapter_of_ones_own_is_measured_by_its_recipe(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str | None] = set()

    def note(request: httpx.Request) -> httpx.Response:
        asked.add(request.url.params.get("adapter"))
        return httpx.Response(200, json={"generated_text": " positive"})

    class Client(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, transport=httpx.MockTransport(note))

    monkeypatch.setattr(httpx, "AsyncClient", Client)
    out = data / "out.json"
    quality.main(data=data, recipe=RECIPE, adapter="mine", out=out)
    assert asked == {"mine", None}
    assert json.loads(out.read_text())["mine"]["adapter"] == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "options", [{"recipe": RECIPE}, {"adapter": "mine"}, {"recipe": RECIPE, "write_cards": True}]
)
def test_options_that_do_not_go_together_are_refused(data: Path, options: dict[str, Any]) -> None:
    with pytest.raises(typer.BadParameter):
        quality.main(data=data, **options)


def test_data_that_is_missing_ends_the_command_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.quality: .*sst2/dev\.tsv: .*No such file"):
        quality.main(data=tmp_path, task=["sentiment"])


def test_a_server_that_is_not_there_ends_the_command(data: Path) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.quality: All connection attempts failed"):
        quality.main(data=data, url="http://127.0.0.1:9", task=["sentiment"])
