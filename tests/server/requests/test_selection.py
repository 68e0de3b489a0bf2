"""Where a request can name its adapters, and what those places mean."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dynamic_lora_adapters.compositions.composition import Composition, InvalidComposition
from dynamic_lora_adapters.compositions.saved import SavedCompositions
from dynamic_lora_adapters.compositions.text import parse
from dynamic_lora_adapters.errors import AdapterNotFound
from dynamic_lora_adapters.files.card import TaskCard
from dynamic_lora_adapters.home.inspection import AdapterVersion
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.requests.selection import (
    adapter_name,
    card_of,
    openai_adapter_name,
    select,
)
from dynamic_lora_server.schemas.generate import GenerateRequest
from tests.support.adapters import make_adapter
from tests.support.models import tiny_llama
from tests.support.runtimes import load_runtime, publish


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterRegistry]:
    folder: Path = tmp_path_factory.mktemp("registry")
    runtime = load_runtime(folder)
    for i, name in enumerate(("ner", "tone", "legal")):
        publish(runtime, name, make_adapter(folder / name, tiny_llama(), seed=i))
    yield runtime.registry
    runtime.registry.close()


@pytest.fixture(scope="module")
def saved(registry: AdapterRegistry) -> SavedCompositions:
    return SavedCompositions(registry, registry.index)


def selected(saved: SavedCompositions, query: str | None = None, **body: Any) -> Composition:
    request = GenerateRequest.model_validate({"inputs": "x", **body})
    return select(query, request, saved=saved, base_names=["org/m"])


SUM = "ner*0.7+tone*0.3"
LISTED = [{"name": "tone", "weight": 0.3}, {"name": "ner", "weight": 0.7}]


@pytest.mark.parametrize(
    ("query", "body"),
    [
        (SUM, {}),
        ("ner*0.7 tone*0.3", {}),
        (None, {"parameters": {"adapter_id": SUM}}),
        (None, {"adapters": LISTED}),
        (None, {"parameters": {"adapters": LISTED}}),
        (None, {"adapters": LISTED, "parameters": {"adapters": LISTED}}),
        (
            None,
            {"parameters": {"merged_adapters": {"ids": ["ner", "tone"], "weights": [0.7, 0.3]}}},
        ),
    ],
)
def test_all_places_mean_the_same(
    saved: SavedCompositions, query: str | None, body: dict[str, Any]
) -> None:
    assert str(selected(saved, query, **body)) == SUM


def test_nothing_and_the_names_of_the_base_are_the_base(saved: SavedCompositions) -> None:
    assert selected(saved).is_base
    assert selected(saved, "base").is_base
    assert selected(saved, "org/m").is_base
    assert selected(saved, "ner - ner").is_base


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_base(saved: SavedCompositions, name: str) -> None:
    cases: list[tuple[str, str | None, dict[str, Any]]] = [
        ("?adapter=", name, {}),
        ("?adapter=", name, {"parameters": {"adapter_id": "ner"}}),
        ("parameters.adapter_id", None, {"parameters": {"adapter_id": name}}),
    ]
    for place, query, body in cases:
        with pytest.raises(InvalidParameter) as caught:
            selected(saved, query, **body)
        assert caught.value.message == f"{place} is empty."
        assert caught.value.fix == (
            "Name an adapter; for the base model leave it out, or name 'base'."
        )


def test_versions_can_be_pinned(saved: SavedCompositions, registry: AdapterRegistry) -> None:
    digest = registry.resolve("ner").digest
    assert str(selected(saved, f"ner@{digest[:8]}")) == f"ner@{digest[:8]}"
    listed = [{"name": f"ner@{digest}", "weight": 2.0}]
    assert str(selected(saved, adapters=listed)) == f"ner@{digest}*2"
    with pytest.raises(AdapterNotFound, match="'ner' has no version '00000000'") as caught:
        selected(saved, "ner@00000000*2")
    assert digest[:12] in caught.value.message


@pytest.mark.parametrize("text", ["nerr", "ner+nerr*0.5", "nerr*0"])
def test_unknown_parts_are_named_with_near_misses(saved: SavedCompositions, text: str) -> None:
    with pytest.raises(AdapterNotFound, match="No adapter is named 'nerr'.*'ner'"):
        selected(saved, text)


def test_two_places_must_agree(saved: SavedCompositions) -> None:
    with pytest.raises(InvalidParameter, match=r"\?adapter= names 'ner', but adapters names 'to"):
        selected(saved, "ner", adapters=LISTED)
    with pytest.raises(InvalidParameter, match="'ner'.*'tone'") as caught:
        selected(saved, "ner", parameters={"adapter_id": "tone"})
    assert caught.value.field == "adapter"


@pytest.mark.parametrize(
    ("merged", "text"),
    [
        ({"ids": ["ner", "tone"]}, "ner+tone"),
        ({"ids": ["ner"], "weights": [0.5], "density": 0.0}, "ner*0.5"),
        (
            {"ids": ["tone", "ner"], "weights": [1, 2], "merge_strategy": "ties", "density": 0.5},
            "ties(ner*2+tone,density=0.5,sign=total)",
        ),
        (
            {
                "ids": ["tone", "ner"],
                "merge_strategy": "dare_ties",
                "density": 0.2,
                "majority_sign_method": "frequency",
            },
            "dare_ties(ner+tone,density=0.2,sign=frequency)",
        ),
        (
            {"ids": ["tone"], "merge_strategy": "dare_linear", "density": 1},
            "dare_linear(tone,density=1.0)",
        ),
    ],
)
def test_merged_adapters(saved: SavedCompositions, merged: dict[str, Any], text: str) -> None:
    assert str(selected(saved, parameters={"merged_adapters": merged})) == text


@pytest.mark.parametrize(
    ("merged", "field", "text"),
    [
        ({"ids": ["ner", "tone"], "weights": [1]}, "weights", "2 ids and 1 weights"),
        ({"ids": ["ner"], "weights": []}, "weights", "1 ids and 0 weights"),
        ({"ids": ["ner"], "merge_strategy": "ties"}, "density", "ties needs a density above 0"),
        ({"ids": ["ner"], "density": 0.5}, "density", "linear has no use for density"),
        (
            {"ids": ["ner"], "merge_strategy": "dare_linear", "majority_sign_method": "total"},
            "majority_sign_method",
            "dare_linear has no use for majority_sign_method",
        ),
    ],
)
def test_merge_settings_that_do_not_fit(
    saved: SavedCompositions, merged: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(InvalidParameter, match=text) as caught:
        selected(saved, parameters={"merged_adapters": merged})
    assert caught.value.field == f"parameters.merged_adapters.{field}"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"adapters": []}, "adapters"),
        ({"parameters": {"adapters": []}}, "parameters.adapters"),
        ({"parameters": {"merged_adapters": {"ids": []}}}, "parameters.merged_adapters.ids"),
        ({"adapters": [{"name": "ner", "weight": 101}]}, "adapters.0.weight"),
        ({"adapters": [{"name": "ner", "scale": 1}]}, "adapters.0.scale"),
        ({"adapters": [{"weight": 1}]}, "adapters.0.name"),
        ({"parameters": {"merged_adapters": {}}}, "parameters.merged_adapters.ids"),
        (
            {"parameters": {"merged_adapters": {"ids": ["a"], "merge_strategy": "slerp"}}},
            "parameters.merged_adapters.merge_strategy",
        ),
    ],
)
def test_bodies_that_are_refused(
    saved: SavedCompositions, body: dict[str, Any], place: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        selected(saved, **body)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == place


def test_a_list_holds_names_not_sums(saved: SavedCompositions) -> None:
    with pytest.raises(InvalidComposition, match="column 4: expected the end"):
        selected(saved, adapters=[{"name": "ner*2"}])
    with pytest.raises(InvalidComposition, match="'base' is what every composition adds to"):
        selected(saved, adapters=[{"name": "base"}])


def test_the_base_model_has_several_names() -> None:
    assert adapter_name("base", base_names=["org/m", "house"]) is None
    for name in ("org/m", "house"):
        assert adapter_name(name, base_names=["org/m", "house"]) is None
    assert adapter_name(None, base_names=["org/m", "house"]) is None
    assert adapter_name("ner", base_names=["org/m", "house"]) == "ner"


def version(name: str, card: TaskCard | None) -> AdapterVersion:
    return AdapterVersion(name=name, digest="", passport=Passport.model_construct(), card=card)


CARD = TaskCard.model_validate({"prompt_template": "Text: {input}"})
OTHER = CARD.model_copy(update={"prompt_template": "Other: {input}"})
TWIN = CARD.model_copy(update={"description": "asks as CARD does"})


@pytest.mark.parametrize(
    ("text", "cards", "expected"),
    [
        ("a", [CARD], CARD),
        ("a*0.5", [CARD], CARD),
        ("a+b", [CARD, TWIN], CARD),
        ("a+b", [CARD, OTHER], None),
        ("a+b", [CARD, None], None),
        ("a - b", [CARD, OTHER], CARD),
        ("-a", [CARD], None),
        ("a - a", [], None),
    ],
)
def test_the_card_of_a_composition(
    text: str, cards: list[TaskCard | None], expected: TaskCard | None
) -> None:
    versions = [version(str(i), card) for i, card in enumerate(cards)]
    assert card_of(parse(text), versions) == expected


@pytest.mark.parametrize("name", ["tgi", "dummy"])
def test_what_clients_send_where_no_model_is_named(name: str) -> None:
    def called(known: set[str]) -> str | None:
        return openai_adapter_name(name, base_names=["org/m"], known=known.__contains__)

    assert called({"ner"}) is None
    assert called({name}) == name


def test_a_chats_model_is_otherwise_a_name_like_any() -> None:
    names = {
        name: openai_adapter_name(name, base_names=["org/m"], known=lambda _: False)
        for name in ("base", "org/m", "ner")
    }
    assert names == {"base": None, "org/m": None, "ner": "ner"}
