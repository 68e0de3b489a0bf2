from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import Session, create_engine, select

from dynamic_lora_adapters.errors import StoreFailed
from dynamic_lora_adapters.home.index import (
    AdapterIndex,
    EventKind,
    NameRow,
    StoredVersion,
    shipped_digests,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'index.sqlite'}"


@pytest.fixture
def index(url: str) -> Iterator[AdapterIndex]:
    index = AdapterIndex(url, "base-a")
    yield index
    index.close()


def put(index: AdapterIndex, name: str, digest: str, *, shipped: bool = False) -> None:
    index.put(name, digest, passport=f"p-{digest}", sizes={"f": 3}, shipped=shipped)


def kinds(index: AdapterIndex, name: str | None = None) -> list[str]:
    return [str(event.kind) for event in index.history(name)]


def test_a_name_points_at_its_latest_content(index: AdapterIndex) -> None:
    put(index, "ner", "d1")
    put(index, "ner", "d2")
    assert index.names() == {"ner": "d2"}
    (stored,) = index.versions()
    assert abs(datetime.now(UTC) - stored.created_at) < timedelta(minutes=5)
    assert stored == StoredVersion("base-a", "ner", "d2", "p-d2", {"f": 3}, stored.created_at)
    assert kinds(index) == ["uploaded", "moved"]
    assert not index.is_used("d1")


def test_a_passport_is_replaced(index: AdapterIndex) -> None:
    put(index, "a", "d")
    put(index, "b", "d")
    index.put_passport("a", "d", "newer")
    assert {v.name: v.passport for v in index.versions()} == {"a": "newer", "b": "p-d"}
    assert kinds(index, "a") == ["uploaded"]


def test_two_names_share_a_content(index: AdapterIndex) -> None:
    put(index, "a", "d")
    put(index, "b", "d")
    index.drop("a", EventKind.DELETED)
    assert index.is_used("d")
    index.drop("b", EventKind.LOST)
    assert not index.is_used("d")
    assert kinds(index, "a") == ["uploaded", "deleted"]
    assert kinds(index, "b") == ["uploaded", "lost"]


def test_dropping_what_is_not_there_leaves_no_trace(index: AdapterIndex) -> None:
    index.drop("x", EventKind.DELETED)
    assert index.history() == []


def test_it_is_all_there_after_a_restart(index: AdapterIndex, url: str) -> None:
    put(index, "ner", "d", shipped=True)
    index.close()
    again = AdapterIndex(url, "base-a")
    assert again.names() == {"ner": "d"}
    assert shipped_digests(again.history("ner")) == {"d"}
    again.close()


def test_each_base_has_its_own_names(index: AdapterIndex, url: str) -> None:
    other = AdapterIndex(url, "base-b")
    put(index, "ner", "d1")
    put(other, "ner", "d2")
    assert index.names() == {"ner": "d1"}
    assert other.names() == {"ner": "d2"}
    assert other.is_used("d1")
    assert {version.base for version in index.versions()} == {"base-a", "base-b"}
    index.drop("ner", EventKind.LOST, base="base-b")
    assert other.names() == {}
    assert kinds(index) == ["uploaded"]
    other.close()


def test_times_are_utc_and_creation_survives_a_move(index: AdapterIndex, url: str) -> None:
    put(index, "ner", "d1")
    put(index, "ner", "d2")
    (event, _) = index.history("ner")
    assert event.at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - event.at) < timedelta(minutes=5)
    engine = create_engine(url)
    with Session(engine) as session:
        row = session.exec(select(NameRow)).one()
    engine.dispose()
    assert row.created_at < row.updated_at


def test_compositions_are_kept_by_base_and_name(index: AdapterIndex, url: str) -> None:
    first = index.put_composition("b", "x*2")
    index.put_composition("a", "x*0.5")
    assert [(one.name, one.text) for one in index.compositions()] == [("a", "x*0.5"), ("b", "x*2")]
    again = index.put_composition("b", "x*3")
    assert (again.text, again.created_at) == ("x*3", first.created_at)
    other = AdapterIndex(url, "base-b")
    assert other.compositions() == []
    other.drop_composition("b")
    other.close()
    index.drop_composition("a")
    index.drop_composition("a")
    assert index.compositions() == [again]


@pytest.mark.parametrize("url", ["no url", "nosuch://host/db", "sqlite+nosuch:///x"])
def test_a_url_that_is_none_or_lacks_its_driver(url: str) -> None:
    with pytest.raises(StoreFailed, match="database cannot be used") as caught:
        AdapterIndex(url, "base-a")
    assert caught.value.field == "database_url"


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="unable to open database file"):
        AdapterIndex(f"sqlite:///{tmp_path}/nowhere/index.sqlite", "base-a")


def test_a_database_that_cannot_be_written(index: AdapterIndex, url: str) -> None:
    put(index, "ner", "d1")
    only_read = AdapterIndex(f"{url.replace('///', '///file:')}?mode=ro&uri=true", "base-a")
    with pytest.raises(StoreFailed, match="readonly database"):
        put(only_read, "ner", "d2")
    assert only_read.names() == {"ner": "d1"}
    only_read.close()
