"""Homes and indexes that do not belong together: nothing is lost on either side."""

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from dynamic_lora_adapters import AdapterRegistry, BaseGeometry, EventKind
from dynamic_lora_adapters.errors import StoreFailed
from tests.support.adapters import edit_config
from tests.support.uploads import copy_adapter


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere.sqlite"


@pytest.fixture
def changed(adapter: Path, tmp_path: Path) -> Path:
    """The adapter with another alpha."""
    folder = copy_adapter(adapter, tmp_path / "changed")
    edit_config(folder, lora_alpha=4)
    return folder


def opened(home: Path, geometry: BaseGeometry, database: Path | None = None) -> AdapterRegistry:
    return AdapterRegistry(
        home, geometry, database_url=None if database is None else f"sqlite:///{database}"
    )


def publish(registry: AdapterRegistry, name: str, source: Path) -> None:
    with registry.staging() as folder:
        copy_adapter(source, folder)
        registry.publish(name, folder, force=True)


def names(registry: AdapterRegistry) -> list[str]:
    return [passport.name for passport in registry.list()]


def age(home: Path, database: Path) -> None:
    """Leave both as a release that knew no ids did."""
    (home / "id").unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE adapter_homes")
    connection.close()


@pytest.mark.parametrize("what", ["an empty folder", "leftovers", "another home"])
def test_a_disk_that_is_not_mounted_costs_nothing(
    what: str,
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    changed: Path,
    database: Path,
    tmp_path: Path,
) -> None:
    with opened(home, geometry, database) as registry:
        publish(registry, "a", adapter)
        publish(registry, "b", changed)
        digest = registry.resolve("a").digest
    home.rename(tmp_path / "disk")
    if what == "another home":
        with opened(home, geometry) as registry:
            publish(registry, "a", adapter)
    elif what == "leftovers":
        shutil.copytree(tmp_path / "disk" / "adapters" / digest, home / "adapters" / digest)
    for _ in range(2):
        with pytest.raises(StoreFailed, match="is not the home whose adapters") as caught:
            opened(home, geometry, database)
        assert f"'{home}'" in caught.value.message
        assert str(database) in caught.value.message
        assert caught.value.field == "home"
        assert (home / "adapters" / digest).exists() == (what != "an empty folder")
    shutil.rmtree(home)
    (tmp_path / "disk").rename(home)
    with opened(home, geometry, database) as registry:
        assert names(registry) == ["a", "b"]
        assert all(registry.load(passport.version).linears for passport in registry.list())


def test_a_home_that_is_gone_for_good_is_replaced_by_who_says_so(
    home: Path, geometry: BaseGeometry, adapter: Path, database: Path
) -> None:
    with opened(home, geometry, database) as registry:
        publish(registry, "a", adapter)
    theirs = (home / "id").read_text().strip()
    shutil.rmtree(home)
    with pytest.raises(StoreFailed) as caught:
        opened(home, geometry, database)
    assert f"write {theirs} into {home / 'id'}" in (caught.value.fix or "")
    (home / "id").write_text(theirs)
    with opened(home, geometry, database) as registry:
        assert names(registry) == []
        assert [event.kind for event in registry.index.history("a")][-1] is EventKind.LOST
        publish(registry, "a", adapter)
    with opened(home, geometry, database) as registry:
        assert names(registry) == ["a"]


@pytest.mark.parametrize("aged", [False, True])
def test_a_start_with_another_database_removes_no_files(
    aged: bool, home: Path, geometry: BaseGeometry, adapter: Path, changed: Path, database: Path
) -> None:
    with opened(home, geometry, database) as registry:
        publish(registry, "a", adapter)
        publish(registry, "b", changed)
    if aged:
        age(home, database)
    for _ in range(2):
        with pytest.raises(StoreFailed, match="index.sqlite does not know the home") as caught:
            opened(home, geometry)
        assert f"'{home}'" in caught.value.message
        assert (f"delete {home / 'id'}" in (caught.value.fix or "")) is not aged
    with opened(home, geometry, database) as registry:
        assert names(registry) == ["a", "b"]
        assert all(registry.load(passport.version).linears for passport in registry.list())


def test_files_that_are_given_up_are_no_obstacle(
    home: Path, geometry: BaseGeometry, adapter: Path, database: Path
) -> None:
    with opened(home, geometry, database) as registry:
        publish(registry, "a", adapter)
    with pytest.raises(StoreFailed) as caught:
        opened(home, geometry)
    assert f"to be given up, delete {home / 'adapters'}." in (caught.value.fix or "")
    shutil.rmtree(home / "adapters")
    with opened(home, geometry) as registry:
        publish(registry, "b", adapter)
    with opened(home, geometry) as registry:
        assert names(registry) == ["b"]


def test_an_older_home_and_its_index_get_an_id(
    home: Path, geometry: BaseGeometry, adapter: Path, database: Path
) -> None:
    with opened(home, geometry, database) as registry:
        publish(registry, "a", adapter)
    before = (home / "id").read_text()
    age(home, database)
    with opened(home, geometry, database) as registry:
        assert names(registry) == ["a"]
        assert (home / "id").read_text() not in ("", before)
    with pytest.raises(StoreFailed):
        opened(home.parent / "other", geometry, database)


def test_an_older_index_does_not_take_a_folder_without_its_files(
    home: Path, geometry: BaseGeometry, adapter: Path, database: Path, tmp_path: Path
) -> None:
    with opened(home, geometry, database) as registry:
        publish(registry, "a", adapter)
    age(home, database)
    home.rename(tmp_path / "disk")
    for _ in range(2):
        with pytest.raises(StoreFailed, match="has none of the adapters that sqlite"):
            opened(home, geometry, database)
    shutil.rmtree(home)
    (tmp_path / "disk").rename(home)
    with opened(home, geometry, database) as registry:
        assert names(registry) == ["a"]


def test_a_stale_index_does_not_take_a_home_for_a_content_in_common(
    home: Path, geometry: BaseGeometry, adapter: Path, changed: Path, database: Path
) -> None:
    with opened(home, geometry) as registry:
        publish(registry, "shipped", adapter)
    age(home, home / "index.sqlite")
    shutil.rmtree(home / "adapters")
    with opened(home, geometry, database) as registry:
        publish(registry, "shipped", adapter)
        publish(registry, "mine", changed)
    with pytest.raises(StoreFailed, match="does not know the home"):
        opened(home, geometry)
    with opened(home, geometry, database) as registry:
        assert names(registry) == ["mine", "shipped"]
        assert all(registry.load(passport.version).linears for passport in registry.list())


@pytest.mark.parametrize("num_homes", [1, 2])
def test_bases_share_a_database_in_homes_of_their_own_or_in_one(
    num_homes: int,
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    changed: Path,
    database: Path,
) -> None:
    other = replace(geometry, model_id="org/Tiny-Other")
    theirs = home if num_homes == 1 else home.parent / "theirs"
    for _ in range(2):
        with opened(home, geometry, database) as registry:
            publish(registry, "ner", adapter)
        with opened(theirs, other, database) as registry:
            publish(registry, "tone", changed)
    for folder, base, own in ((home, geometry, "ner"), (theirs, other, "tone")):
        with opened(folder, base, database) as registry:
            assert names(registry) == [own]
            assert registry.load(registry.resolve(own).digest).linears


def test_bases_that_shared_an_older_home_keep_their_names(
    home: Path, geometry: BaseGeometry, adapter: Path, changed: Path
) -> None:
    other = replace(geometry, model_id="org/Tiny-Other")
    with opened(home, geometry) as registry:
        publish(registry, "ner", adapter)
    with opened(home, other) as registry:
        publish(registry, "tone", changed)
    age(home, home / "index.sqlite")
    for base, own in ((geometry, "ner"), (other, "tone")):
        with opened(home, base) as registry:
            assert names(registry) == [own]
