import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamic_lora_adapters import AdapterError
from dynamic_lora_adapters.errors import StoreFailed
from dynamic_lora_adapters.home.store import BlobStore

DIGEST = "d" * 64
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[BlobStore]:
    store = BlobStore(home)
    yield store
    store.close()


def fill(folder: Path) -> Path:
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def publish(store: BlobStore) -> None:
    with store.staging() as folder:
        store.prepare(fill(folder))
        store.publish(folder, DIGEST)


def staged(home: Path) -> list[Path]:
    return list((home / "staging").iterdir())


def test_published_files_are_there_whole(store: BlobStore, home: Path) -> None:
    publish(store)
    assert {p.name: p.read_bytes() for p in store.path(DIGEST).iterdir()} == FILES
    assert store.digests() == {DIGEST}
    assert store.sizes(DIGEST) == {name: len(data) for name, data in FILES.items()}
    assert store.path(DIGEST) == home / "adapters" / DIGEST
    assert staged(home) == []


def test_publishing_twice_keeps_the_first(store: BlobStore, home: Path) -> None:
    publish(store)
    before = (store.path(DIGEST) / "adapter_config.json").stat().st_ino
    publish(store)
    assert (store.path(DIGEST) / "adapter_config.json").stat().st_ino == before
    assert staged(home) == []


def test_the_same_content_in_another_spelling_keeps_the_first(store: BlobStore) -> None:
    publish(store)
    before = store.sizes(DIGEST)
    with store.staging() as folder:
        (fill(folder) / "adapter_config.json").write_bytes(b"{ }")
        store.prepare(folder)
        store.publish(folder, DIGEST)
    assert store.sizes(DIGEST) == before


def test_other_files_are_left_behind(store: BlobStore) -> None:
    with store.staging() as folder:
        (fill(folder) / "junk").write_bytes(b"x")
        store.prepare(folder)
        store.publish(folder, DIGEST)
    assert set(os.listdir(store.path(DIGEST))) == set(FILES)


def test_an_abandoned_upload_is_gone(store: BlobStore, home: Path) -> None:
    with pytest.raises(KeyError), store.staging() as folder:
        fill(folder)
        raise KeyError
    assert staged(home) == []
    assert store.digests() == set()


def test_removed(store: BlobStore, home: Path) -> None:
    publish(store)
    store.remove(DIGEST)
    store.remove(DIGEST)
    assert store.digests() == set()
    assert store.sizes(DIGEST) == {}
    assert len(staged(home)) == 1
    store.sweep()
    assert staged(home) == []


@pytest.mark.parametrize("call", range(5))
def test_a_failure_at_any_flush_publishes_nothing(
    call: int, store: BlobStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise OSError("no space left")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    # Two files, their folder, and the folder above them after the rename.
    if call < 4:
        with pytest.raises(OSError, match="no space left"):
            publish(store)
    else:
        publish(store)
    assert store.digests() == (set() if call < 3 else {DIGEST})
    assert staged(home) == []


def test_a_failure_of_the_rename_publishes_nothing(
    store: BlobStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError("crash")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="crash"):
        publish(store)
    assert store.digests() == set()
    assert staged(home) == []


def test_files_are_flushed_before_the_rename(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("flush")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    publish(store)
    assert steps == ["flush", "flush", "flush", "rename", "flush"]


def test_what_a_crash_left_in_staging_is_swept(store: BlobStore, home: Path) -> None:
    """What somebody else put there is not."""
    left, theirs = home / "staging" / f"{7:032x}", home / "staging" / "release"
    for folder in (left, theirs):
        folder.mkdir()
        fill(folder)
    store.close()
    BlobStore(home).close()
    assert staged(home) == [theirs]
    assert list(theirs.iterdir())


def test_a_removal_cut_short_is_finished_at_the_next_start(store: BlobStore, home: Path) -> None:
    publish(store)
    store.remove(DIGEST)
    assert store.digests() == set()
    assert len(staged(home)) == 1
    store.close()
    BlobStore(home).close()
    assert staged(home) == []


def test_a_home_has_one_user_at_a_time(store: BlobStore, home: Path) -> None:
    with pytest.raises(AdapterError, match="Another server is using") as caught:
        BlobStore(home)
    assert "--home" in (caught.value.fix or "")
    store.close()
    BlobStore(home).close()


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailed, match="cannot be written: Not a directory") as caught:
        BlobStore(tmp_path / "file" / "home")
    assert "--home" in (caught.value.fix or "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_disk_that_takes_no_more_while_an_upload_is_collected(
    store: BlobStore, home: Path, number: int
) -> None:
    with pytest.raises(StoreFailed, match=os.strerror(number)), store.staging():
        raise OSError(number, os.strerror(number))
    assert staged(home) == []


def test_other_faults_of_a_file_stay_what_they_are(store: BlobStore) -> None:
    with pytest.raises(FileNotFoundError), store.staging() as folder:
        (folder / "nothing").open()
