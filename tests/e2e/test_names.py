"""Names with capitals and a slash, as vLLM's and LoRAX's clients have them, on every route."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dynamic_lora_client import Client
from tests.support.adapters import make_adapter
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama

NAMES = ["SQL-Lora", "predibase/customer_support", "predibase/Customer_Support"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(folder / str(seed), tiny_llama(), seed=seed)
        for seed, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def http(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]
) -> Iterator[httpx.Client]:
    root = folders[NAMES[0]].parent
    config = tiny_config(tmp_path_factory.mktemp("server"), adapter_roots=(root,))
    with (
        listening(tiny_app(config)) as address,
        httpx.Client(base_url=address, timeout=60) as http,
        Client(address) as client,
    ):
        for name, path in folders.items():
            client.upload(name, path)
        yield http


@pytest.fixture
def client(http: httpx.Client) -> Iterator[Client]:
    with Client(str(http.base_url)) as client:
        yield client


def test_each_is_an_adapter_of_its_own(http: httpx.Client, client: Client) -> None:
    assert [adapter.name for adapter in client.adapters()] == sorted(NAMES)
    versions = {name: client.adapter(name).version for name in NAMES}
    assert len(set(versions.values())) == len(NAMES)
    for name in NAMES:
        for spelt in (name, name.replace("/", "%2F")):
            assert http.get(f"/adapters/{spelt}").json()["version"] == versions[name]
            assert http.get(f"/v1/models/{spelt}").json()["root"] == versions[name]
        answer = client.generate("the king", adapter=name, max_new_tokens=2)
        assert (answer.adapter, answer.adapter_version) == (name, versions[name])


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_asked_for_everywhere(http: httpx.Client, name: str) -> None:
    body = {"inputs": "the king", "parameters": {"max_new_tokens": 2}}
    in_body = body | {"parameters": {"max_new_tokens": 2, "adapter_id": name}}
    for answer in (
        http.post(f"/generate?adapter={name}", json=body),
        http.post(f"/generate?adapter={name.replace('/', '%2F')}", json=body),
        http.post("/generate_stream", json=in_body),
    ):
        assert answer.headers["x-adapter"] == name
    prompt = {"model": name, "prompt": "the king", "max_tokens": 2}
    assert http.post("/v1/completions", json=prompt).json()["model"] == name
    assert name in [model["id"] for model in http.get("/v1/models").json()["data"]]
    metrics = http.get("/metrics").text
    assert f'dynamic_lora_generated_tokens_total{{adapter="{name}"}}' in metrics
    assert f'dynamic_lora_adapter_resident{{adapter="{name}"}}' in metrics


def test_sums_of_them_are_saved_under_such_names(http: httpx.Client, client: Client) -> None:
    text = f"{NAMES[0]}*0.5-{NAMES[1]}*0.25"
    saved = client.save_composition("Org/Blend", text)
    assert (saved.name, saved.text) == ("Org/Blend", text)
    assert client.composition("Org/Blend") == saved
    answer = http.get("/compositions/Org%2FBlend").json()
    assert answer["adapter"] == text
    assert client.generate("the king", adapter="Org/Blend", max_new_tokens=2).adapter == text
    put = http.put("/compositions/Org%2FBlend", json={"adapter": text})
    assert (put.status_code, put.headers["location"]) == (200, "/compositions/Org/Blend")
    client.delete_composition("Org/Blend")
    assert client.compositions() == []


def test_another_case_is_another_name(http: httpx.Client, client: Client) -> None:
    wrong = http.get("/adapters/sql-lora")
    assert (wrong.status_code, wrong.json()["near"]) == (404, ["SQL-Lora"])
    taken = http.put("/compositions/SQL-Lora", json={"adapter": NAMES[1]})
    assert taken.status_code == 409
    free = client.save_composition("sql-lora", f"{NAMES[1]}*2")
    client.delete_composition(free.name)


def test_vllms_route_gives_and_takes_them(http: httpx.Client) -> None:
    body = {"lora_name": "Org/New", "lora_path": "0"}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert http.get("/adapters/Org/New").status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "Org/New"}).status_code == 200
    assert http.get("/adapters/Org/New").status_code == 404


def test_paths_that_are_no_names_are_no_routes(http: httpx.Client) -> None:
    for path in ("/adapters/a/b/c", "/compositions/a/b/c"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
    assert http.get("/adapters/", follow_redirects=True).json()["adapters"]
    assert http.delete("/adapters/predibase%2F").status_code == 307
