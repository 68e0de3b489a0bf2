"""Compositions under names, beside a registry with adapters."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from dynamic_lora_adapters.compositions.composition import (
    InvalidComposition,
    Merge,
    Part,
    Strategy,
    VersionNotFound,
)
from dynamic_lora_adapters.compositions.saved import (
    CompositionNotFound,
    NameTaken,
    SavedCompositions,
)
from dynamic_lora_adapters.compositions.text import parse_parts
from dynamic_lora_adapters.errors import (
    AdapterNotFound,
    InvalidAdapterName,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.home.index import AdapterIndex
from dynamic_lora_adapters.home.inspection import AdapterVersion
from dynamic_lora_adapters.home.lease import Lease
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms, PromptTerms

DIGESTS = {"ner": "a1" * 32, "tone": "b2" * 32, "legal": "d4" * 32}


class Registry(AdapterRegistry):
    """Names and digests without a store; `terms` by name, none for most."""

    def __init__(self) -> None:
        self.digests = dict(DIGESTS)
        self.terms: dict[str, AdapterTerms] = {}
        self.num_leased = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def lease(self, name: str) -> Lease:
        self.num_leased += 1
        return Lease(self.resolve(name), self.release)

    def release(self, lease: Lease) -> None:
        lease.released = True
        self.num_leased -= 1

    def load(self, digest: str) -> AdapterTerms:
        assert self.num_leased
        (name,) = (name for name, own in self.digests.items() if own == digest)
        return self.terms.get(name, AdapterTerms())

    def resolve(self, name: str) -> AdapterVersion:
        if name not in self.digests:
            raise AdapterNotFound(name)
        passport = Passport.model_construct(name=name)
        return AdapterVersion(name=name, digest=self.digests[name], passport=passport, card=None)

    def has(self, name: str) -> bool:
        return name in self.digests

    def names(self) -> set[str]:
        return set(self.digests)


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'index.sqlite'}"


@pytest.fixture
def index(url: str) -> Iterator[AdapterIndex]:
    index = AdapterIndex(url, "base-a")
    yield index
    index.close()


@pytest.fixture
def saved(registry: Registry, index: AdapterIndex) -> SavedCompositions:
    return SavedCompositions(registry, index)


def save(saved: SavedCompositions, name: str, text: str) -> bool:
    return saved.save(name, parse_parts(text))[1]


def test_a_saved_name_stands_for_its_text(saved: SavedCompositions) -> None:
    assert save(saved, "newsy", "tone*0.3 + ner*0.70")
    assert str(saved.resolve("newsy")) == "ner*0.7+tone*0.3"
    assert str(saved.resolve("newsy*2 - legal")) == "-legal+ner*1.4+tone*0.6"
    assert str(saved.resolve("newsy - newsy")) == "base"
    stored = saved.get("newsy")
    assert (stored.name, stored.text) == ("newsy", "ner*0.7+tone*0.3")
    assert abs((stored.created_at - datetime.now(UTC)).total_seconds()) < 60


def test_saving_again_replaces_and_all_survives_a_restart(
    saved: SavedCompositions, registry: Registry, index: AdapterIndex
) -> None:
    assert save(saved, "newsy", "ner*0.7")
    assert not save(saved, "newsy", "ner*0.5")
    assert save(saved, "a", "tone*2")
    again = SavedCompositions(registry, index)
    assert [(one.name, one.text) for one in again.list()] == [("a", "tone*2"), ("newsy", "ner*0.5")]
    assert again.get("newsy") == saved.get("newsy")


def test_each_base_has_its_own(saved: SavedCompositions, registry: Registry, url: str) -> None:
    save(saved, "newsy", "ner*0.7")
    other = AdapterIndex(url, "base-b")
    assert SavedCompositions(registry, other).list() == []
    other.close()


def test_deleting(saved: SavedCompositions, registry: Registry, index: AdapterIndex) -> None:
    save(saved, "newsy", "ner*0.7")
    saved.delete("newsy")
    for fails in (saved.delete, saved.get):
        with pytest.raises(CompositionNotFound, match="No composition is named 'newsy'"):
            fails("newsy")
    with pytest.raises(AdapterNotFound):
        saved.resolve("newsy")
    assert SavedCompositions(registry, index).list() == []


def test_deleting_what_is_being_looked_up(
    saved: SavedCompositions, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saved, "newsy", "ner*0.7")

    def delete_meanwhile(name: str) -> bool:
        monkeypatch.undo()
        saved.delete("newsy")
        return registry.has(name)

    monkeypatch.setattr(registry, "has", delete_meanwhile)
    assert str(saved.resolve("newsy*2")) == "ner*1.4"


def test_near_names_are_of_both_kinds(saved: SavedCompositions) -> None:
    save(saved, "newsy", "ner*0.7")
    with pytest.raises(AdapterNotFound, match="Did you mean 'newsy'"):
        saved.resolve("newsi")
    with pytest.raises(AdapterNotFound, match="Did you mean 'tone'"):
        saved.resolve("tones*2")
    with pytest.raises(CompositionNotFound, match="Did you mean 'newsy'"):
        saved.get("newsi")


def test_near_names_are_looked_for_once(
    saved: SavedCompositions, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "resolve", None)  # which looks among the adapters alone
    with pytest.raises(AdapterNotFound, match="Did you mean 'tone'"):
        saved.resolve("tones")


def test_names_are_given_once(saved: SavedCompositions) -> None:
    with pytest.raises(NameTaken, match="'ner' is the name of an adapter"):
        save(saved, "ner", "tone*2")
    save(saved, "newsy", "tone*2")
    with pytest.raises(NameTaken, match="'newsy' is the name of a saved composition"):
        saved.check_free("newsy")
    saved.check_free("other")
    with pytest.raises(NameTaken), saved.kept_for_adapter("newsy"):
        pytest.fail("a composition has the name")
    with (
        saved.kept_for_adapter("fresh"),
        saved.kept_for_adapter("fresh"),
        pytest.raises(NameTaken, match="'fresh' is the name of an adapter"),
    ):
        save(saved, "fresh", "tone*2")
    save(saved, "fresh", "tone*2")
    with pytest.raises(InvalidAdapterName, match="cannot be an adapter's name"):
        save(saved, "News y", "tone*2")
    with pytest.raises(InvalidAdapterName, match="means the base model"):
        saved.save("m", parse_parts("ner"), reserved=("org/m", "m"))


def test_a_name_is_known_in_any_case(saved: SavedCompositions) -> None:
    save(saved, "org/Newsy", "tone*2")
    assert saved.spelt_as("ORG/newsy") == "org/Newsy"
    assert saved.spelt_as("Ner") == saved.spelt_as("ner") == "ner"
    assert saved.spelt_as("org") is None


def test_saved_ones_do_not_nest(saved: SavedCompositions) -> None:
    save(saved, "newsy", "ner*0.7")
    with pytest.raises(InvalidComposition, match="'newsy' is a saved composition") as caught:
        save(saved, "more", "newsy*2+tone")
    assert caught.value.fix == "Write it out: ner*0.7."
    ties = Merge(strategy=Strategy.TIES, density=0.5)
    with pytest.raises(InvalidComposition, match="'newsy' is a saved composition; only adapters"):
        saved.combine([Part("newsy"), Part("tone")], merge=ties)


def test_what_cannot_be_saved(saved: SavedCompositions) -> None:
    with pytest.raises(InvalidComposition, match="The weights add up to nothing"):
        save(saved, "nothing", "ner - ner")
    with pytest.raises(AdapterNotFound, match="No adapter is named 'nar'"):
        save(saved, "x", "ner+nar")
    assert saved.list() == []


def test_a_sum_that_could_never_run_is_not_saved(
    saved: SavedCompositions, registry: Registry
) -> None:
    registry.terms["tone"] = AdapterTerms(prompt=PromptTerms(num_tokens=1))
    for text in ("ner*0.7+tone", "tone*0.5"):
        with pytest.raises(UnsupportedAdapter) as caught:
            save(saved, "newsy", text)
        assert caught.value.message == (
            "The adapter 'tone' is a prompt of virtual tokens, and so has no weighted sum with "
            "others."
        )
    # What float16 cannot hold, in the registry's dtype.
    factors = LinearTerms(a=torch.ones(1, 2), b=torch.full((2, 1), 2000.0))
    registry.terms["ner"] = AdapterTerms(linears={"layer": factors})
    assert save(saved, "fits", "ner*4")
    with pytest.raises(UnsupportedAdapter, match="values on 'layer' that are too large"):
        save(saved, "newsy", "ner*5")
    assert [one.name for one in saved.list()] == ["fits"]
    assert save(saved, "alias", "tone")
    assert registry.num_leased == 0


def test_parts_follow_their_names_unless_pinned(
    saved: SavedCompositions, registry: Registry
) -> None:
    save(saved, "follows", "ner*2")
    save(saved, "pinned", "ner@a1a1a1a1*2")
    registry.digests["ner"] = "c3" * 32
    assert str(saved.resolve("follows")) == "ner*2"
    with pytest.raises(VersionNotFound, match="'ner' has no version 'a1a1a1a1'.*'c3c3c3c3c3c3'"):
        saved.resolve("pinned")
    with pytest.raises(InvalidComposition, match="saved composition and has no versions"):
        saved.resolve("follows@a1a1a1a1")
