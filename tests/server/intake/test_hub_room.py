"""Which of the adapters that were fetched make room for others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_adapters import AdapterRegistry, Passport
from dynamic_lora_adapters.compositions.composition import Part
from dynamic_lora_adapters.compositions.saved import SavedCompositions
from dynamic_lora_adapters.errors import AdapterNotFound, StoreFailed
from dynamic_lora_server.intake import hub_room
from dynamic_lora_server.intake.hub_room import make_room
from tests.support.adapters import make_adapter
from tests.support.geometry import geometry_of
from tests.support.models import tiny_llama
from tests.support.uploads import copy_adapter

MODEL = tiny_llama()


class Home:
    """A registry, and how large each of its adapters is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = AdapterRegistry(folder / "home", geometry_of(MODEL))
        self.saved = SavedCompositions(self.registry, self.registry.index)
        self.size = self.add("probe").bytes
        self.registry.delete("probe")

    def add(self, name: str, *, seed: int = 0, fetched: bool = True) -> Passport:
        """Publish an adapter whose content the seed tells."""
        source = self.folder / str(seed)
        if not source.exists():
            make_adapter(source, MODEL, seed=seed)
        with self.registry.staging() as staging:
            copy_adapter(source, staging)
            return self.registry.publish(name, staging, fetched=fetched).passport

    def make(self, num: float, newest: Passport | None = None) -> list[str]:
        """Have room made until so many adapters remain."""
        return make_room(self.registry, self.saved, int(num * self.size), newest=newest)

    @property
    def names(self) -> list[str]:
        return [passport.name for passport in self.registry.list()]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home in which a use is over at once."""
    monkeypatch.setattr(hub_room, "_IN_USE_SECONDS", -1.0)
    found = Home(tmp_path)
    yield found
    found.registry.close()


def test_the_oldest_go_and_those_that_were_named_last_stay(home: Home) -> None:
    for seed, name in enumerate("abcd"):
        home.add(name, seed=seed)
    home.saved.version(Part("a"))
    assert home.make(4) == []
    assert home.make(2.5) == ["b", "c"]
    assert home.make(1) == ["d"]
    assert home.saved.last_named.keys() == {"a"}
    assert home.make(0) == ["a"]
    assert home.saved.last_named == {}


def test_what_was_uploaded_stays_with_all_that_shares_its_files(home: Home) -> None:
    home.add("mine", seed=0, fetched=False)
    home.add("same", seed=0)
    home.add("other", seed=1)
    home.add("twin", seed=1)
    assert home.make(1) == []
    assert home.make(0) == ["other", "twin"]
    assert home.names == ["mine", "same"]


def test_an_upload_of_the_same_makes_it_the_uploaders(home: Home) -> None:
    home.add("a")
    assert home.registry.resolve("a").passport.fetched
    assert not home.add("a", fetched=False).fetched
    home.registry.close()
    home.registry = AdapterRegistry(home.folder / "home", geometry_of(MODEL))
    assert home.make(0) == []
    assert home.names == ["a"]
    home.add("a")
    assert not home.registry.resolve("a").passport.fetched


def test_what_is_in_use_stays(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("leased", "composed", "idle")):
        home.add(name, seed=seed)
    home.saved.save("half", [Part("composed", weight=0.5)])
    lease = home.registry.lease("leased")
    with pytest.raises(StoreFailed, match="in use take all the room") as caught:
        home.make(1)
    assert "--max-hub-bytes" in (caught.value.fix or "")
    assert home.names == ["composed", "idle", "leased"], "it would have gone in vain"
    home.registry.release(lease)
    assert home.make(1) == ["leased", "idle"]
    monkeypatch.setattr(hub_room, "_IN_USE_SECONDS", 60.0)
    newest = home.add("newest", seed=3)
    with pytest.raises(StoreFailed):
        home.make(1, newest=newest)
    assert home.names == ["composed"]


@pytest.mark.parametrize("seed", [0, 1])
def test_what_somebody_uploads_while_room_is_made_stays(
    home: Home, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for number, name in enumerate("abc"):
        home.add(name, seed=number)
    find = hub_room._by_use

    def found_then_uploaded(*args: Any) -> list[Passport]:
        idle = find(*args)
        home.add("a", seed=seed, fetched=False)
        return idle

    monkeypatch.setattr(hub_room, "_by_use", found_then_uploaded)
    assert home.make(1) == ["b"]
    assert home.names == ["a", "c"]
    assert not home.registry.resolve("a").passport.fetched


@pytest.mark.parametrize("seed", [0, 1])
def test_what_somebody_uploads_once_it_was_fetched_stays(home: Home, seed: int) -> None:
    newest = home.add("newest", seed=0)
    home.add("newest", seed=seed, fetched=False)
    home.add("other", seed=2)
    with home.registry.lease("other"):
        assert home.make(0.5, newest=newest) == []
    assert home.names == ["newest", "other"]


def test_a_fetch_of_the_same_content_is_another(home: Home) -> None:
    before = home.add("a")
    home.registry.delete("a")
    assert home.add("a").version == before.version
    with pytest.raises(AdapterNotFound):
        home.registry.delete("a", only=before)
    assert home.names == ["a"]
