"""Compositions over HTTP: exact in a mixed batch, under all their names, and refused by name."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraModel, PeftModel, PromptTuningConfig, get_peft_model

from dynamic_lora_client import AsyncClient, Client
from tests.support.adapters import edit_config, load_with_peft, make_adapter, quiet
from tests.support.engines import peft_greedy
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama, tiny_tokenizer

NUM_TOKENS = 10
PROMPT = "it is a long way to the end of the story"
KINDS: dict[str, dict[str, Any]] = {
    "ner": {"rank": 4, "targets": ["q_proj", "v_proj"], "seed": 1},
    "tone": {"rank": 8, "targets": "all-linear", "use_rslora": True, "seed": 2},
    "legal": {"rank": 3, "alpha": 16, "targets": ["down_proj", "o_proj", "q_proj"], "seed": 4},
}
SUMS: dict[str, dict[str, float]] = {
    "ner*0.7+tone*0.3": {"ner": 0.7, "tone": 0.3},
    "legal*-0.5+ner*0.7+tone*0.3": {"ner": 0.7, "tone": 0.3, "legal": -0.5},
    "ner*2.5": {"ner": 2.5},
    "-tone*0.25": {"tone": -0.25},
    "ner - legal": {"ner": 1, "legal": -1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, tiny_llama(), **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[str]:
    with listening(tiny_app(tiny_config(tmp_path_factory.mktemp("server")))) as address:
        with Client(address) as client:
            for name, folder in folders.items():
                client.upload(name, folder)
        yield address


@pytest.fixture
async def http(address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        yield client
        for saved in (await client.get("/compositions")).json()["compositions"]:
            await client.delete(f"/compositions/{saved['name']}")


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> PeftModel:
    return load_with_peft(tiny_llama(), folders)


def summed(folders: dict[str, Path], weights: dict[str, float]) -> PeftModel:
    """The base with the fp32 sum of PEFT's own deltas in its weights; one idle adapter on top."""
    model = tiny_llama()
    peft = load_with_peft(model, folders)
    modules = dict(model.named_modules())
    for path, layer in peft.get_base_model().named_modules():
        for name, weight in weights.items():
            if name in getattr(layer, "lora_A", {}):
                weight_of = modules[path].get_parameter("weight")
                weight_of.data += weight * layer.get_delta_weight(name)
    return load_with_peft(model, {"idle": folders["ner"]})


def expected(folders: dict[str, Path], weights: dict[str, float], prompt: str) -> list[int]:
    ids = tiny_tokenizer()(prompt)["input_ids"]
    return peft_greedy(summed(folders, weights), None, ids, NUM_TOKENS)


async def ask(
    http: httpx.AsyncClient, adapter: str | None = None, prompt: str = PROMPT, **body: Any
) -> httpx.Response:
    parameters = {"max_new_tokens": NUM_TOKENS, "details": True, "ignore_eos": True}
    parameters |= body.pop("parameters", {})
    return await http.post(
        "/generate",
        params={} if adapter is None else {"adapter": adapter},
        json={"inputs": prompt, "parameters": parameters, **body},
    )


def ids(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["details"]["tokens"]]


async def test_each_sum_equals_the_summed_weights_alone_and_in_a_mixed_batch(
    http: httpx.AsyncClient, folders: dict[str, Path], oracle: PeftModel
) -> None:
    prompt_ids = tiny_tokenizer()(PROMPT)["input_ids"]
    wanted = {text: expected(folders, weights, PROMPT) for text, weights in SUMS.items()}
    for name in ("ner", "tone", None):
        wanted[name or "base"] = peft_greedy(oracle, name, prompt_ids, NUM_TOKENS)
    assert len({tuple(tokens) for tokens in wanted.values()}) > 4  # adapters are told apart
    together = await asyncio.gather(*(ask(http, text) for text in wanted))
    for (text, tokens), answer in zip(wanted.items(), together, strict=True):
        assert ids(answer) == tokens, text
        assert ids(await ask(http, text)) == tokens, text


async def test_log_probabilities_equal_pefts_weighted_adapter(
    http: httpx.AsyncClient, folders: dict[str, Path]
) -> None:
    same = {name: folders[name] for name in ("ner", "legal")}
    model = load_with_peft(tiny_llama(), same)
    lora = model.base_model
    assert isinstance(lora, LoraModel)
    lora.add_weighted_adapter(["ner", "legal"], [0.7, 0.5], "sum", "cat")
    model.set_adapter("sum")
    answer = (await ask(http, "ner*0.7+legal*0.5")).json()["details"]
    tokens = [token["id"] for token in answer["tokens"]]
    prompt_ids = tiny_tokenizer()(PROMPT)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt_ids + tokens])).logits[0]
    reference = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    for i, token in enumerate(answer["tokens"]):
        assert token["logprob"] == pytest.approx(float(reference[i, token["id"]]), abs=1e-4)


async def test_all_ways_to_name_a_sum(http: httpx.AsyncClient) -> None:
    sum_ = "ner*0.7+tone*0.3"
    first = await ask(http, sum_)
    listed = [{"name": "tone", "weight": 0.3}, {"name": "ner", "weight": 0.7}]
    merged = {"ids": ["ner", "tone"], "weights": [0.7, 0.3], "merge_strategy": "linear"}
    raw_query = await http.post(
        f"/generate?adapter={sum_}",
        json={"inputs": PROMPT, "parameters": {"max_new_tokens": NUM_TOKENS, "details": True}},
    )
    answers = [
        raw_query,
        await ask(http, "  tone*0.30 + ner*.7"),
        await ask(http, adapters=listed),
        await ask(http, parameters={"adapters": listed}),
        await ask(http, parameters={"adapter_id": sum_}),
        await ask(http, parameters={"merged_adapters": merged}),
    ]
    for answer in answers:
        assert answer.headers["x-adapter"] == sum_
        assert answer.headers["x-adapter-version"] == first.headers["x-adapter-version"]
        assert answer.json()["generated_text"] == first.json()["generated_text"]
    body = {"model": sum_, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    completion = await http.post("/v1/completions", json=body | {"ignore_eos": True})
    assert completion.json()["choices"][0]["text"] == first.json()["generated_text"]
    assert completion.json()["model"] == sum_
    assert 'adapter="composition"' in (await http.get("/metrics")).text


async def test_one_adapter_with_weight_1_is_the_adapter_itself(http: httpx.AsyncClient) -> None:
    plain = await ask(http, "ner")
    version = plain.headers["x-adapter-version"]
    assert (await http.get("/adapters/ner")).json()["version"] == version
    for text, canonical in (
        ("ner*1.0", "ner"),
        ("ner*0.5+ner*0.5", "ner"),
        (f"ner@{version[:8]}", f"ner@{version[:8]}"),
    ):
        answer = await ask(http, text)
        assert ids(answer) == ids(plain)
        assert answer.headers["x-adapter"] == canonical
        assert answer.headers["x-adapter-version"] == version
    nothing = await ask(http, "ner - ner")
    assert nothing.headers["x-adapter"] == "base"
    assert ids(nothing) == ids(await ask(http))


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
async def test_merge_strategies_are_served_and_repeat(
    http: httpx.AsyncClient, strategy: str
) -> None:
    merged = {"ids": ["ner", "legal"], "merge_strategy": strategy, "density": 0.6}
    first = await ask(http, parameters={"merged_adapters": merged})
    again = await ask(http, parameters={"merged_adapters": merged})
    assert ids(first) == ids(again)
    assert first.headers["x-adapter"].startswith(f"{strategy}(legal+ner,density=0.6")
    linear = await ask(http, "ner+legal")
    assert first.headers["x-adapter-version"] != linear.headers["x-adapter-version"]


async def test_the_life_of_a_saved_composition(http: httpx.AsyncClient) -> None:
    put = await http.put("/compositions/newsy", json={"adapter": "tone*0.3 + ner*0.7"})
    assert put.status_code == 201, put.text
    assert put.headers["location"] == "/compositions/newsy"
    saved = put.json()
    assert saved["adapter"] == "ner*0.7+tone*0.3"
    assert [(p["name"], p["weight"], p["pinned"]) for p in saved["parts"]] == [
        ("ner", 0.7, None),
        ("tone", 0.3, None),
    ]
    by_name, by_text = await ask(http, "newsy"), await ask(http, "ner*0.7+tone*0.3")
    assert ids(by_name) == ids(by_text)
    assert by_name.headers["x-adapter-version"] == saved["version"]
    assert ids(await ask(http, "newsy*0.5")) == ids(await ask(http, "ner*0.35+tone*0.15"))
    assert (await http.get("/compositions/newsy")).json() == saved
    assert (await http.get("/compositions")).json() == {"compositions": [saved]}
    models = {model["id"]: model for model in (await http.get("/v1/models")).json()["data"]}
    assert models["newsy"]["root"] == "ner*0.7+tone*0.3"
    assert (await http.get("/v1/models/newsy")).json() == models["newsy"]
    listed = {"adapters": [{"name": "ner", "weight": 2}]}
    replaced = await http.put("/compositions/newsy", json=listed)
    assert (replaced.status_code, replaced.json()["adapter"]) == (200, "ner*2")
    assert (await http.delete("/compositions/newsy")).status_code == 204
    assert (await ask(http, "newsy")).status_code == 404
    gone = await http.delete("/compositions/newsy")
    assert (gone.status_code, gone.json()["type"]) == (404, "/problems/composition-not-found")


async def test_new_content_of_a_part_is_new_content_of_the_sum(
    http: httpx.AsyncClient, address: str, folders: dict[str, Path]
) -> None:
    async with AsyncClient(address) as client:
        await client.upload("moving", folders["ner"])
        await http.put("/compositions/follows", json={"adapter": "moving*0.5+tone"})
        before = await ask(http, "follows")
        await client.upload("moving", folders["legal"])
        after = await ask(http, "follows")
        assert before.headers["x-adapter-version"] != after.headers["x-adapter-version"]
        assert ids(after) == ids(await ask(http, "legal*0.5+tone"))
        await client.delete("moving")
        missing = (await http.get("/compositions/follows")).json()
        assert missing["version"] is None
        assert [part["version"] for part in missing["parts"]][0] is None
        answer = await ask(http, "follows")
        assert answer.status_code == 404
        assert "No adapter is named 'moving'" in answer.json()["detail"]


BAD: list[tuple[str, int, str, str]] = [
    ("ner*0.7+tone*", 422, "invalid-composition", "column 14: expected a number after '*'"),
    ("ner*x", 422, "invalid-composition", "column 5: expected a number after '*'"),
    ("ner+tonne*2", 404, "adapter-not-found", "No adapter is named 'tonne'. Did you mean 'tone'"),
    ("ner@00000000", 404, "version-not-found", "'ner' has no version '00000000'"),
    ("ner*101", 422, "invalid-composition", "weights lie between -100 and 100"),
    ("nerr", 404, "adapter-not-found", "No adapter is named 'nerr'"),
]


@pytest.mark.parametrize(("text", "status", "slug", "detail"), BAD)
async def test_bad_texts(
    http: httpx.AsyncClient, text: str, status: int, slug: str, detail: str
) -> None:
    asked = await ask(http, text)
    saved = await http.put("/compositions/x", json={"adapter": text})
    for answer in (asked, saved):
        problem = answer.json()
        assert (answer.status_code, problem["type"]) == (status, f"/problems/{slug}")
        assert detail in problem["detail"]
    assert asked.json()["field"] == "adapter"
    openai = await http.post("/v1/completions", json={"model": text, "prompt": "x"})
    assert openai.status_code == {422: 400}.get(status, status)
    assert openai.json()["error"]["param"] == "model"


async def test_a_name_that_no_adapter_can_have(http: httpx.AsyncClient) -> None:
    """It may be that of the base, and is only then looked for; a sum has to be read."""
    asked = (await ask(http, "a/b/c")).json()
    assert (asked["status"], asked["type"]) == (404, "/problems/adapter-not-found")
    saved = (await http.put("/compositions/x", json={"adapter": "a/b/c"})).json()
    assert (saved["status"], saved["type"]) == (422, "/problems/invalid-composition")


async def test_names_are_given_once(http: httpx.AsyncClient, folders: dict[str, Path]) -> None:
    taken = await http.put("/compositions/ner", json={"adapter": "tone*2"})
    assert (taken.status_code, taken.json()["type"]) == (409, "/problems/name-taken")
    await http.put("/compositions/newsy", json={"adapter": "tone*2"})
    files = [("files", (p.name, p.read_bytes())) for p in folders["ner"].iterdir()]
    refused = await http.post("/adapters", data={"name": "newsy"}, files=files)
    assert (refused.status_code, refused.json()["type"]) == (409, "/problems/name-taken")
    assert (await http.get("/adapters/newsy")).status_code == 404


@pytest.mark.parametrize(
    "body", [{}, {"adapter": "ner*2", "adapters": [{"name": "ner"}]}, {"adapter": "newsy*2"}]
)
async def test_bodies_that_cannot_be_saved(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    await http.put("/compositions/newsy", json={"adapter": "tone*2"})
    answer = await http.put("/compositions/other", json=body)
    assert answer.status_code == 422
    assert (await http.get("/compositions/other")).status_code == 404


async def test_sums_that_could_never_run_are_refused_when_they_are_saved(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with quiet():
        get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path))
    edit_config(tmp_path, base_model_name_or_path=None)
    files = [("files", (p.name, p.read_bytes())) for p in tmp_path.glob("adapter_*")]
    assert (await http.post("/adapters", data={"name": "soft"}, files=files)).status_code == 201
    used = (await ask(http, "ner+soft*0.5")).json()
    saved = await http.put("/compositions/x", json={"adapter": "ner+soft*0.5"})
    assert saved.status_code == 422
    assert saved.json() == used
    assert "The adapter 'soft' is a prompt of virtual tokens" in used["detail"]
    alone = await http.put("/compositions/x", json={"adapter": "soft"})
    assert alone.status_code == 201
    await http.delete("/adapters/soft")


async def test_weights_that_cancel_in_decimals_are_the_base(http: httpx.AsyncClient) -> None:
    answer = await ask(http, "ner*0.1+ner*0.2-ner*0.3")
    assert answer.headers["x-adapter"] == "base"
    refused = await http.put("/compositions/x", json={"adapter": "ner*0.1+ner*0.2-ner*0.3"})
    assert "The weights add up to nothing" in refused.json()["detail"]
