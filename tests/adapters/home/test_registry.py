import difflib
import errno
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import dynamic_lora_adapters as package
from dynamic_lora_adapters import (
    AdapterError,
    AdapterNotFound,
    AdapterRegistry,
    BaseGeometry,
    EventKind,
    IncompatibleAdapter,
    Intake,
    InvalidAdapter,
    InvalidAdapterName,
    Lease,
    Publication,
    UnsafeArchive,
    UnsupportedAdapter,
    UploadLimits,
)
from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.errors import StoreFailed
from dynamic_lora_adapters.files.template_process import PROCESSES
from dynamic_lora_adapters.home.index import AdapterIndex
from dynamic_lora_adapters.home.inspection import Inspector, folder_digest
from dynamic_lora_adapters.near_names import near_names
from tests.support.adapters import edit_config, save_adapter
from tests.support.models import TINY_MODELS
from tests.support.uploads import WEIGHTS_FILE, copy_adapter, edit_tensors


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path, geometry: BaseGeometry) -> Iterator[AdapterRegistry]:
    with AdapterRegistry(home, geometry) as registry:
        yield registry


@pytest.fixture
def changed(adapter: Path, tmp_path: Path) -> Path:
    """The adapter with another alpha."""
    folder = copy_adapter(adapter, tmp_path / "changed")
    edit_config(folder, lora_alpha=4)
    return folder


def publish(
    registry: AdapterRegistry, name: str, source: Path, *, force: bool = False, replace: bool = True
) -> Publication:
    with registry.staging() as folder:
        intake = Intake(folder, registry.limits)
        intake.add_folder(source)
        ignored = intake.ignored_files
        return registry.publish(name, folder, force=force, replace=replace, ignored_files=ignored)


def blobs(home: Path) -> set[str]:
    return set(os.listdir(home / "adapters"))


def assert_clean(home: Path, digests: set[str]) -> None:
    assert blobs(home) == digests
    assert os.listdir(home / "staging") == []


def names(registry: AdapterRegistry) -> list[str]:
    return [passport.name for passport in registry.list()]


def kinds(registry: AdapterRegistry, name: str) -> list[EventKind]:
    return [event.kind for event in registry.index.history(name)]


def test_published_adapters_can_be_listed_resolved_and_loaded(
    registry: AdapterRegistry, adapter: Path, geometry: BaseGeometry, home: Path
) -> None:
    (adapter / "task.json").write_text('{"description": "d", "prompt_template": "<{input}>"}')
    published = publish(registry, "ner", adapter)
    assert published.created
    version = registry.resolve("ner")
    assert version.passport == published.passport == registry.list()[0]
    assert version.digest == published.passport.version
    assert version.card is not None
    assert version.card.render("x") == "<x>"
    assert version.passport.notes == []
    assert registry.load(version.digest).linears.keys() == geometry.linears.keys()
    assert_clean(home, {version.digest})


def test_the_same_content_again_changes_nothing(registry: AdapterRegistry, adapter: Path) -> None:
    first, second = publish(registry, "ner", adapter), publish(registry, "ner", adapter)
    assert (first.created, second.created) == (True, False)
    assert second.passport == first.passport
    assert kinds(registry, "ner") == [EventKind.UPLOADED]


def test_another_name_shares_the_files(
    registry: AdapterRegistry, adapter: Path, home: Path
) -> None:
    first, second = publish(registry, "a", adapter), publish(registry, "b", adapter)
    assert second.created
    assert second.passport.name == "b"
    assert_clean(home, {first.passport.version})
    registry.delete("a")
    assert registry.load(second.passport.version)
    registry.delete("b")
    assert_clean(home, set())


def test_names_with_the_same_content_in_other_spellings_survive_a_restart(
    home: Path, geometry: BaseGeometry, adapter: Path, tmp_path: Path
) -> None:
    respelt = copy_adapter(adapter, tmp_path / "respelt")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (respelt / "adapter_config.json").write_text(json.dumps(config))
    with AdapterRegistry(home, geometry) as registry:
        first, second = publish(registry, "a", adapter), publish(registry, "b", respelt)
        assert first.passport.version == second.passport.version
    with AdapterRegistry(home, geometry) as registry:
        assert names(registry) == ["a", "b"]


def test_new_content_moves_the_name(
    registry: AdapterRegistry, adapter: Path, changed: Path, home: Path
) -> None:
    old, new = publish(registry, "ner", adapter), publish(registry, "ner", changed)
    assert new.created
    assert old.passport.version != new.passport.version
    assert registry.resolve("ner").digest == new.passport.version
    assert kinds(registry, "ner") == [EventKind.UPLOADED, EventKind.MOVED]
    assert_clean(home, {new.passport.version})


def test_a_card_makes_another_version(registry: AdapterRegistry, adapter: Path) -> None:
    plain = publish(registry, "ner", adapter)
    (adapter / "task.json").write_text('{"prompt_template": "<{input}>"}')
    assert publish(registry, "ner", adapter).passport.version != plain.passport.version


def test_a_chat_template_is_kept_and_makes_another_version(
    home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        plain = publish(registry, "plain", adapter)
        (adapter / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
        first = publish(registry, "ner", adapter)
        assert first.passport.version != plain.passport.version
        assert (first.passport.chat_template, plain.passport.chat_template) == (True, False)
        # The same template in another file, beside what does not count.
        (adapter / "tokenizer_config.json").write_text('{"model_max_length": 9}')
        (adapter / "chat_template.jinja").write_text("{{ messages }}")
        again = publish(registry, "twin", adapter)
        assert again.passport.version == first.passport.version
        assert {path.name for path in (home / "adapters" / again.passport.version).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat.json",
        }
        kept = registry.resolve("ner")
    with AdapterRegistry(home, geometry) as registry:
        assert registry.resolve("ner") == kept
        assert kept.chat is not None
        assert kept.chat.template == "{{ messages }}"
        assert registry.resolve("plain").chat is None


def test_unknown_names_get_the_near_misses(registry: AdapterRegistry, adapter: Path) -> None:
    publish(registry, "sentiment", adapter)
    for action in (registry.resolve, registry.delete, registry.lease):
        with pytest.raises(AdapterNotFound, match="Did you mean 'sentiment'") as caught:
            action("sentimant")
        assert caught.value.near == ("sentiment",)
    with pytest.raises(AdapterNotFound, match=r"^No adapter is named 'zzz'\.$"):
        registry.resolve("zzz")


def test_names_that_differ_in_case_are_two(
    home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        for name in ("SQL-Lora", "org/Name", "org/name"):
            publish(registry, name, adapter)
        with pytest.raises(AdapterNotFound, match="Did you mean 'SQL-Lora'"):
            registry.resolve("sql-lora")
        edit_config(adapter, lora_alpha=3)
        publish(registry, "sql-lora", adapter)
        assert registry.resolve("SQL-Lora").digest != registry.resolve("sql-lora").digest
        registry.delete("org/Name")
    with AdapterRegistry(home, geometry) as registry:
        assert names(registry) == ["SQL-Lora", "org/name", "sql-lora"]
        assert registry.resolve("SQL-Lora").digest == registry.resolve("org/name").digest
        assert kinds(registry, "org/Name") == [EventKind.UPLOADED, EventKind.DELETED]


def test_a_name_is_left_alone_by_what_is_not_to_replace_it(
    registry: AdapterRegistry, adapter: Path, changed: Path
) -> None:
    first = publish(registry, "ner", adapter)
    late = publish(registry, "ner", changed, replace=False)
    assert not late.created
    assert late.passport.version == first.passport.version == registry.resolve("ner").digest
    assert publish(registry, "new", changed, replace=False).created
    assert len(list((registry._store.path(first.passport.version)).parent.iterdir())) == 2


def test_a_deleted_adapter_is_gone(registry: AdapterRegistry, adapter: Path, home: Path) -> None:
    digest = publish(registry, "ner", adapter).passport.version
    registry.delete("ner")
    assert names(registry) == []
    assert kinds(registry, "ner") == [EventKind.UPLOADED, EventKind.DELETED]
    with pytest.raises(AdapterNotFound):
        registry.load(digest)
    assert_clean(home, set())


def spoil_nan(folder: Path) -> None:
    edit_tensors(folder, lambda t: next(iter(t.values())).fill_(float("nan")))


BAD: dict[str, tuple[Callable[[Path], object], type[AdapterError], str]] = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        InvalidAdapter,
        "adapter_config.json is missing",
    ),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), InvalidAdapter, "is missing"),
    "broken config": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        InvalidAdapter,
        "not valid JSON",
    ),
    "truncated": (lambda f: os.truncate(f / WEIGHTS_FILE, 999), InvalidAdapter, "not a whole"),
    "NaN": (spoil_nan, InvalidAdapter, "holds NaN"),
    "card": (
        lambda f: (f / "task.json").write_text('{"titel": 1}'),
        InvalidAdapter,
        "task.json: titel",
    ),
    "rank 0": (lambda f: edit_config(f, r=0), InvalidAdapter, "r must be an integer"),
    "another base": (
        lambda f: edit_config(f, base_model_name_or_path="org/other"),
        IncompatibleAdapter,
        "trained on 'org/other'",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BAD.values(), ids=BAD)
def test_a_refused_upload_changes_nothing(
    spoil: Callable[[Path], object],
    error: type[AdapterError],
    message: str,
    registry: AdapterRegistry,
    adapter: Path,
    changed: Path,
    home: Path,
) -> None:
    kept = publish(registry, "ner", changed).passport
    spoil(adapter)
    with pytest.raises(error, match=message):
        publish(registry, "ner", adapter)
    assert registry.list() == [kept]
    assert_clean(home, {kept.version})


@pytest.mark.parametrize("name", ["a b", "", "a/b/c", "base", "tiny-llama", "org/Tiny-Llama"])
def test_bad_names_are_refused(name: str, registry: AdapterRegistry, adapter: Path) -> None:
    with pytest.raises(InvalidAdapterName):
        publish(registry, name, adapter)


def test_force_and_origin_are_noted(registry: AdapterRegistry, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="org/other", revision="v1")
    notes = publish(registry, "forced", adapter, force=True).passport.notes
    assert notes[0].startswith("Forced: the adapter was trained on 'org/other'")
    assert "revision 'v1'" in notes[1]
    edit_config(adapter, base_model_name_or_path="/data/tiny", revision=None)
    (note,) = publish(registry, "local", adapter).passport.notes
    assert "local copy" in note


def test_force_does_not_bend_shapes(home: Path, adapter: Path) -> None:
    wide = BaseGeometry.of(TINY_MODELS["llama"](intermediate_size=128), model_id="wide")
    with AdapterRegistry(home, wide) as registry, pytest.raises(IncompatibleAdapter):
        publish(registry, "ner", adapter, force=True)


def test_targets_without_a_module_and_ignored_files_are_noted(
    registry: AdapterRegistry, adapter: Path
) -> None:
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    edit_config(adapter, target_modules=[*targets, "w1"])
    (adapter / "README.md").write_text("x")
    passport = publish(registry, "ner", adapter).passport
    assert passport.notes == ["target_modules lists 'w1', which the base does not have."]
    assert passport.ignored_files == ["README.md"]


def test_a_lease_outlives_deletion(registry: AdapterRegistry, adapter: Path, home: Path) -> None:
    publish(registry, "ner", adapter)
    with registry.lease("ner") as first, registry.lease("ner") as second:
        registry.delete("ner")
        registry.release(first)
        registry.release(first)
        assert registry.load(second.version.digest)
        assert blobs(home) == {second.version.digest}
    assert_clean(home, set())


def test_a_lease_outlives_a_move(
    registry: AdapterRegistry, adapter: Path, changed: Path, home: Path
) -> None:
    publish(registry, "ner", adapter)
    lease: Lease = registry.lease("ner")
    new = publish(registry, "ner", changed).passport.version
    assert registry.load(lease.version.digest)
    assert blobs(home) == {lease.version.digest, new}
    registry.release(lease)
    assert_clean(home, {new})


def test_a_release_keeps_what_a_name_still_needs(
    registry: AdapterRegistry, adapter: Path, home: Path
) -> None:
    digest = publish(registry, "ner", adapter).passport.version
    with registry.lease("ner"):
        registry.delete("ner")
        publish(registry, "again", adapter)
    assert_clean(home, {digest})


def test_a_release_asks_the_index_for_what_a_name_has_left_alone(
    registry: AdapterRegistry,
    geometry: BaseGeometry,
    adapter: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A database that is away fails no answer that is made, and leaves nothing for ever."""
    publish(registry, "ner", adapter)

    def away(*_: object) -> bool:
        raise ConnectionError("the database is away")

    kept, left = registry.lease("ner"), registry.lease("ner")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterIndex, "is_used", away)
        registry.release(kept)
        registry.release(registry.lease("ner"))
    registry.delete("ner")
    monkeypatch.setattr(AdapterIndex, "is_used", away)
    registry.release(left)
    assert blobs(home) == {left.version.digest}
    registry.close()
    monkeypatch.undo()
    AdapterRegistry(home, geometry).close()
    assert_clean(home, set())


def test_near_names_are_found_among_many(registry: AdapterRegistry, adapter: Path) -> None:
    for name in ("sentiment", "sentiments-2"):
        publish(registry, name, adapter)
    with pytest.raises(AdapterNotFound, match="Did you mean 'sentiment'"):
        registry.resolve("sentimnt")
    assert near_names("SENTIMENTS", ["sentiments", "Sentiments", "ner"]) == [
        "Sentiments",
        "sentiments",
    ]
    many = [f"s-{number}" for number in range(5000)]
    assert near_names("sentimnt", [*many, "sentiment"])[0] == "sentiment"


def test_a_name_as_long_as_a_body_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert near_names("sentiment" * 2, ["sentiment"]) == ["sentiment"]
    monkeypatch.setattr(difflib, "get_close_matches", None)
    assert near_names("sentiment" * 10**5, ["sentiment", "ner"]) == ()
    assert near_names("sentiment", []) == ()


def test_everything_survives_a_restart(home: Path, geometry: BaseGeometry, adapter: Path) -> None:
    (adapter / "task.json").write_text('{"prompt_template": "<{input}>"}')
    with AdapterRegistry(home, geometry) as registry:
        publish(registry, "ner", adapter)
        before = registry.resolve("ner")
    with AdapterRegistry(home, geometry) as registry:
        assert registry.resolve("ner") == before
        assert registry.load(before.digest)


def test_a_leased_and_deleted_version_is_dropped_by_the_next_start(
    home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        publish(registry, "ner", adapter)
        registry.lease("ner")
        registry.delete("ner")
    AdapterRegistry(home, geometry).close()
    assert_clean(home, set())


@pytest.mark.parametrize("damage", ["gone", "truncated", "a file gone"])
def test_damaged_files_are_dropped_with_a_warning(
    damage: str,
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    changed: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        folder = home / "adapters" / publish(registry, "ner", adapter).passport.version
        kept = publish(registry, "kept", changed).passport.version
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "truncated":
        os.truncate(folder / WEIGHTS_FILE, 100)
    else:
        (folder / "adapter_config.json").unlink()
    with caplog.at_level(logging.WARNING), AdapterRegistry(home, geometry) as registry:
        assert names(registry) == ["kept"]
        assert kinds(registry, "ner") == [EventKind.UPLOADED, EventKind.LOST]
    assert "'ner' dropped: its files are damaged or gone" in caplog.text
    assert_clean(home, {kept})


@pytest.mark.parametrize("damage", ["gone", "changed", "a file gone"])
def test_uploading_again_mends_damaged_files(
    damage: str, home: Path, geometry: BaseGeometry, adapter: Path, tmp_path: Path
) -> None:
    respelt = copy_adapter(adapter, tmp_path / "respelt")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (respelt / "adapter_config.json").write_text(json.dumps(config))
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
        publish(registry, "other", adapter)
        weights = home / "adapters" / digest / WEIGHTS_FILE
        if damage == "gone":
            shutil.rmtree(weights.parent)
        elif damage == "changed":
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        else:
            weights.unlink()
        again = publish(registry, "ner", respelt)
        assert (again.created, again.passport.version) == (False, digest)
        assert folder_digest(home / "adapters" / digest) == digest
        assert registry.load(digest).linears
        assert_clean(home, {digest})
    with AdapterRegistry(home, geometry) as registry:
        assert names(registry) == ["ner", "other"]


def test_a_passport_of_another_release_is_written_anew(
    home: Path, geometry: BaseGeometry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        before = publish(registry, "ner", adapter).passport
    with sqlite3.connect(home / "index.sqlite") as connection:
        connection.execute("UPDATE adapter_versions SET passport = '{}'")
    connection.close()
    with AdapterRegistry(home, geometry) as registry:
        after = registry.resolve("ner").passport
    assert abs(after.created_at - before.created_at) < timedelta(seconds=10)
    assert after.model_copy(update={"created_at": before.created_at}) == before
    # Once: reading all adapters at each start would take long.
    with monkeypatch.context() as patch:
        patch.delattr(Inspector, "inspect")
        again = AdapterRegistry(home, geometry)
    with again:
        assert again.resolve("ner").passport == after


@pytest.mark.parametrize("error", [RuntimeError("it did not start"), OSError("no process")])
def test_a_start_compiles_no_template(
    error: Exception,
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with AdapterRegistry(home, geometry) as registry:
        publish(registry, "ner", adapter)
    rewrite_passports(home, "{}")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PROCESSES, "render", refuse)
    with AdapterRegistry(home, geometry) as registry:
        chat = registry.resolve("ner").chat
    assert chat is not None
    assert chat.template == "{{ messages }}"


def rewrite_passports(home: Path, passport: str) -> None:
    with sqlite3.connect(home / "index.sqlite") as connection:
        connection.execute("UPDATE adapter_versions SET passport = ?", (passport,))
    connection.close()


def test_a_passport_that_says_more_is_read_for_what_is_known(
    home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        before = publish(registry, "ner", adapter).passport
    rewrite_passports(home, json.dumps(json.loads(before.model_dump_json()) | {"colour": "blue"}))
    with AdapterRegistry(home, geometry) as registry:
        assert registry.resolve("ner").passport == before


@pytest.mark.parametrize("remedy", ["upload", "delete", "another release"])
def test_what_cannot_be_read_any_more_is_kept_and_keeps_nobody_from_starting(
    remedy: str,
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
    rewrite_passports(home, "{}")

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedAdapter("layer_replication = [[0, 2]] is not served.")

    with monkeypatch.context() as patch:
        patch.setattr(Inspector, "inspect", refuse)
        registry = AdapterRegistry(home, geometry)
    with registry:
        assert "'ner' is not served: layer_replication" in caplog.text
        assert names(registry) == []
        assert registry.has("ner")  # a composition must not take the name
        why = "'ner' was stored by another release and cannot be read: layer_replication"
        for ask in (registry.resolve, registry.lease):
            with pytest.raises(UnsupportedAdapter, match=why):
                ask("ner")
        if remedy == "upload":
            assert publish(registry, "ner", adapter).created
        elif remedy == "delete":
            registry.delete("ner")
            with pytest.raises(AdapterNotFound):
                registry.resolve("ner")
    assert_clean(home, set() if remedy == "delete" else {digest})
    with AdapterRegistry(home, geometry) as registry:
        assert names(registry) == ([] if remedy == "delete" else ["ner"])


def test_a_chat_format_of_a_newer_release_keeps_nobody_from_starting(
    home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    (adapter / "generation_config.json").write_text('{"eos_token_id": 4}')
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
    kept = home / "adapters" / digest / "chat.json"
    kept.write_text(kept.read_text().replace("end_ids", "new_ids"))
    with AdapterRegistry(home, geometry) as registry:
        with pytest.raises(UnsupportedAdapter, match=r"cannot be read: chat\.json\.new_ids: Extra"):
            registry.resolve("ner")
        assert blobs(home) == {digest}


def hide(path: Path, aside: Path) -> None:
    """Move a file or folder away and leave what the system refuses to open, whoever asks."""
    path.rename(aside)
    path.symlink_to(path)


@pytest.mark.parametrize("what", ["folder", "adapter_config.json", WEIGHTS_FILE])
def test_what_the_system_refuses_to_read_is_kept_and_named(
    what: str,
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    changed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
        kept = publish(registry, "kept", changed).passport.version
    folder, aside = home / "adapters" / digest, tmp_path / "aside"
    hidden = folder if what == "folder" else folder / what
    hide(hidden, aside)
    for _ in range(2):
        with AdapterRegistry(home, geometry) as registry:
            assert names(registry) == ["kept"]
            (unreadable,) = registry.unreadable()
            assert (unreadable.name, unreadable.digest) == ("ner", digest)
            assert unreadable.why.startswith(f"{hidden.name}: Too many levels")
            with pytest.raises(StoreFailed, match="files of 'ner' cannot be read: .* Too many"):
                registry.resolve("ner")
        assert f"'ner' is not served: {unreadable.why}" in caplog.text
        assert blobs(home) == {digest, kept}
    hidden.unlink()
    aside.rename(hidden)
    with AdapterRegistry(home, geometry) as registry:
        assert names(registry) == ["kept", "ner"]
        assert registry.load(digest).linears


def record_sizes(home: Path, sizes: dict[str, int]) -> None:
    with sqlite3.connect(home / "index.sqlite") as connection:
        connection.execute("UPDATE adapter_versions SET sizes = ?", (json.dumps(sizes),))
    connection.close()


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("adapter_config.json", '{"peft_type": "NEWEST", "r": 8}', "NEWEST"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8}', "lora_alpha is missing"),
        ("chat.json", '{"new_ids": []}', r"chat\.json\.new_ids: Extra"),
        ("new.json", "{}", r"does not know its files \['new\.json'\]"),
    ],
)
def test_files_of_another_format_are_kept_whatever_their_sizes(
    file: str, text: str, why: str, home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    (adapter / "generation_config.json").write_text('{"eos_token_id": 4}')
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
        (stored,) = registry.index.versions()
    (home / "adapters" / digest / file).write_text(text)
    record_sizes(home, {**stored.sizes, file: 1})
    for _ in range(2):
        with AdapterRegistry(home, geometry) as registry:
            with pytest.raises(UnsupportedAdapter, match=why):
                registry.resolve("ner")
            assert [one.name for one in registry.unreadable()] == ["ner"]
            assert kinds(registry, "ner") == [EventKind.UPLOADED]
        assert blobs(home) == {digest}


def test_what_cannot_be_removed_keeps_nobody_from_starting(
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
    (home / "adapters" / "stray").mkdir()

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        AdapterRegistry(home, geometry).close()
    assert "version stray cannot be removed: Permission denied" in caplog.text
    assert blobs(home) == {digest, "stray"}
    AdapterRegistry(home, geometry).close()
    assert_clean(home, {digest})


def test_weights_that_cannot_be_read_while_it_runs_are_named(
    registry: AdapterRegistry, adapter: Path, home: Path, tmp_path: Path
) -> None:
    digest = publish(registry, "ner", adapter).passport.version
    hide(home / "adapters" / digest / WEIGHTS_FILE, tmp_path / "aside")
    with pytest.raises(StoreFailed, match=rf"version {digest[:12]} cannot be read: {WEIGHTS_FILE}"):
        registry.load(digest)


def test_a_shipped_adapter_that_cannot_be_read_is_left_alone(
    home: Path, geometry: BaseGeometry, shipped: Path, tmp_path: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        registry.import_shipped(shipped)
        digest = registry.resolve("ner").digest
    hide(home / "adapters" / digest, tmp_path / "aside")
    edit_config(shipped / "ner", lora_alpha=3)
    with AdapterRegistry(home, geometry) as registry:
        assert registry.import_shipped(shipped) == []
    assert blobs(home) == {digest}


def test_a_new_release_replaces_what_it_shipped_and_cannot_read(
    home: Path, geometry: BaseGeometry, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        registry.import_shipped(shipped)
    rewrite_passports(home, "{}")

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedAdapter("not served")

    with monkeypatch.context() as patch:
        patch.setattr(Inspector, "inspect", refuse)
        registry = AdapterRegistry(home, geometry)
    with registry:
        assert registry.import_shipped(shipped) == ["ner"]
        assert names(registry) == ["ner"]


def test_who_waits_for_no_disk_is_not_held_up_by_an_upload(
    registry: AdapterRegistry, adapter: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, "ner", adapter)
    flushing, go_on = threading.Event(), threading.Event()

    def slowly(_: int) -> None:
        flushing.set()
        assert go_on.wait(30)

    monkeypatch.setattr(os, "fsync", slowly)
    upload = threading.Thread(target=publish, args=(registry, "other", changed))
    upload.start()
    assert flushing.wait(30)
    served = threading.Thread(target=lambda: registry.lease("ner").__exit__(None, None, None))
    served.start()
    served.join(10)
    assert not served.is_alive()
    go_on.set()
    upload.join()
    assert names(registry) == ["ner", "other"]


def test_files_that_take_long_to_remove_hold_up_no_upload(
    registry: AdapterRegistry,
    adapter: Path,
    changed: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(registry, "ner", adapter)
    removing, go_on = threading.Event(), threading.Event()
    rmtree: Callable[..., None] = shutil.rmtree

    def slowly(*args: object, **kwargs: object) -> None:
        if threading.current_thread() is deletion:
            removing.set()
            assert go_on.wait(30)
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    deletion = threading.Thread(target=registry.delete, args=("ner",))
    deletion.start()
    assert removing.wait(30)
    upload = threading.Thread(target=publish, args=(registry, "other", changed))
    upload.start()
    upload.join(10)
    assert not upload.is_alive()
    go_on.set()
    deletion.join()
    assert names(registry) == ["other"]
    assert_clean(home, {registry.resolve("other").digest})


def test_each_base_keeps_its_own_names(
    home: Path, geometry: BaseGeometry, adapter: Path, changed: Path
) -> None:
    other = replace(geometry, model_id="org/Tiny-Other")
    with AdapterRegistry(home, geometry) as registry:
        mine = publish(registry, "ner", adapter).passport.version
    with AdapterRegistry(home, other) as registry:
        assert names(registry) == []
        theirs = publish(registry, "ner", changed, force=True).passport.version
        publish(registry, "shared", adapter, force=True)
        registry.delete("shared")
    assert_clean(home, {mine, theirs})
    with AdapterRegistry(home, geometry) as registry:
        assert registry.resolve("ner").digest == mine


def test_another_database(home: Path, geometry: BaseGeometry, adapter: Path) -> None:
    url = f"sqlite:///{home.parent / 'elsewhere.sqlite'}"
    with AdapterRegistry(home, geometry, database_url=url) as registry:
        publish(registry, "ner", adapter)
    assert not (home / "index.sqlite").exists()
    with AdapterRegistry(home, geometry, database_url=url) as registry:
        assert names(registry) == ["ner"]


def test_limits_are_kept(home: Path, geometry: BaseGeometry, adapter: Path) -> None:
    limits = UploadLimits(max_bytes=100)
    with (
        AdapterRegistry(home, geometry, limits=limits) as registry,
        pytest.raises(InvalidAdapter, match="larger than 100 bytes"),
    ):
        publish(registry, "ner", adapter)


def test_a_failing_index_leaves_no_files(
    registry: AdapterRegistry,
    adapter: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr("dynamic_lora_adapters.home.index.AdapterIndex.put", failing)
    with pytest.raises(sqlite3.OperationalError):
        publish(registry, "ner", adapter)
    assert names(registry) == []
    assert_clean(home, set())


@pytest.mark.parametrize("action", ["move", "delete"])
def test_what_was_committed_is_no_failure(
    action: str,
    registry: AdapterRegistry,
    adapter: Path,
    changed: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The files that a name has left can be looked after later."""

    def failing(*_: object) -> None:
        raise sqlite3.OperationalError("disk full")

    before = publish(registry, "ner", adapter).passport.version
    monkeypatch.setattr(AdapterIndex, "is_used", failing)
    if action == "move":
        assert publish(registry, "ner", changed).created
        assert registry.resolve("ner").digest != before
    else:
        registry.delete("ner")
        assert names(registry) == []
    assert f"content {before[:12]} stays until the next start" in caplog.text


def test_sound_files_of_other_sizes_keep_their_names(
    home: Path, geometry: BaseGeometry, adapter: Path
) -> None:
    """As a crash leaves them once they were mended, before the index knows of it."""
    with AdapterRegistry(home, geometry) as registry:
        digest = publish(registry, "ner", adapter).passport.version
    path = home / "adapters" / digest / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    for _ in range(2):
        with AdapterRegistry(home, geometry) as registry:
            assert names(registry) == ["ner"]
            (stored,) = registry.index.versions()
            assert stored.sizes[path.name] == path.stat().st_size


def test_a_registry_is_closed_once_what_changes_it_is_done(
    home: Path,
    geometry: BaseGeometry,
    adapter: Path,
    changed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = AdapterRegistry(home, geometry)
    putting, go_on = threading.Event(), threading.Event()
    put = AdapterIndex.put

    def slowly(*args: Any, **more: Any) -> None:
        putting.set()
        assert go_on.wait(30)
        put(*args, **more)

    monkeypatch.setattr(AdapterIndex, "put", slowly)
    upload = threading.Thread(target=publish, args=(registry, "ner", adapter))
    upload.start()
    assert putting.wait(30)
    closing = threading.Thread(target=registry.close)
    closing.start()
    with pytest.raises(AdapterError, match="Another server is using"):
        AdapterRegistry(home, geometry)
    go_on.set()
    for thread in (upload, closing):
        thread.join(30)
    with AdapterRegistry(home, geometry) as other:
        assert names(other) == ["ner"]
        for change in (lambda: publish(registry, "late", changed), lambda: registry.delete("ner")):
            with pytest.raises(StoreFailed, match="shutting down"):
                change()
        with pytest.raises(StoreFailed, match="shutting down"):
            registry.index.put_composition("late", "ner*2")
        registry.close()
        assert names(other) == ["ner"]


def test_content_that_is_there_is_read_before_others_wait(
    registry: AdapterRegistry, adapter: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, "ner", adapter)
    publish(registry, "other", changed)
    reading, go_on = threading.Event(), threading.Event()

    def slowly(folder: Path, digest: str) -> bool:
        reading.set()
        assert go_on.wait(30)
        return folder_digest(folder) == digest

    monkeypatch.setattr("dynamic_lora_adapters.home.mending.is_sound", slowly)
    upload = threading.Thread(target=publish, args=(registry, "twin", adapter))
    upload.start()
    assert reading.wait(30)
    deletion = threading.Thread(target=registry.delete, args=("other",))
    deletion.start()
    deletion.join(10)
    assert not deletion.is_alive()
    go_on.set()
    upload.join()
    assert names(registry) == ["ner", "twin"]


def test_weights_that_are_a_pickle_alone_are_refused(
    registry: AdapterRegistry, adapter: Path, tmp_path: Path
) -> None:
    both = copy_adapter(adapter, tmp_path / "both")
    (both / "adapter_model.bin").write_bytes(b"pickle")
    passport = publish(registry, "both", both).passport
    assert passport.ignored_files == ["adapter_model.bin"]
    (both / WEIGHTS_FILE).unlink()
    with pytest.raises(UnsafeArchive, match="'adapter_model.bin' is a pickle") as caught:
        publish(registry, "pickled", both)
    assert "safe_serialization" in (caught.value.fix or "")


@pytest.mark.parametrize("large", [False, True])
def test_double_precision_is_read(
    large: bool, registry: AdapterRegistry, adapter: Path, tmp_path: Path
) -> None:
    doubles = copy_adapter(adapter, tmp_path / "doubles")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.double() * (1e300 if large else 1)

    edit_tensors(doubles, widen)
    if large:
        with pytest.raises(InvalidAdapter, match="NaN or infinite"):
            publish(registry, "doubles", doubles)
        return
    passport = publish(registry, "doubles", doubles).passport
    assert passport.dtype == "float64"
    publish(registry, "singles", adapter)
    found, expected = (
        registry.load(registry.resolve(name).digest).linears for name in ("doubles", "singles")
    )
    for path, one in expected.items():
        a = found[path].a
        assert a is not None and one.a is not None and torch.equal(a, one.a)


class Camera:
    """Copies a home at every step that reaches the disk: what a crash there would leave."""

    def __init__(self, home: Path, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures: list[Path] = []
        self._home, self._album = home, album
        for holder, name in (
            (os, "replace"),
            (os, "fsync"),
            (shutil, "rmtree"),
            (AdapterIndex, "put"),
            (AdapterIndex, "drop"),
        ):
            self._watch(holder, name, monkeypatch)

    def _watch(self, holder: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(holder, name)

        def watched(*args: object, **kwargs: object) -> object:
            self.shoot()
            result = original(*args, **kwargs)
            self.shoot()
            return result

        monkeypatch.setattr(holder, name, watched)

    def shoot(self) -> None:
        picture = self._album / str(len(self.pictures))
        shutil.copytree(self._home, picture)
        self.pictures.append(picture)


@pytest.mark.parametrize("action", ["first upload", "move", "delete"])
def test_a_crash_at_any_step_leaves_nothing_to_mend(
    action: str,
    home: Path,
    tmp_path: Path,
    geometry: BaseGeometry,
    adapter: Path,
    changed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        old = publish(registry, "ner", adapter).passport.version
        if action == "first upload":
            registry.delete("ner")
        with monkeypatch.context() as patch:
            camera = Camera(home, tmp_path / "album", patch)
            if action == "delete":
                registry.delete("ner")
            else:
                publish(registry, "ner", changed)
        after = {v.version for v in registry.list()}
    before = set() if action == "first upload" else {old}
    assert len(camera.pictures) >= 4
    seen = []
    for picture in camera.pictures:
        with AdapterRegistry(picture, geometry) as registry:
            digests = {passport.version for passport in registry.list()}
            for digest in digests:
                assert registry.load(digest)
        assert digests in (before, after)
        assert_clean(picture, digests)
        seen.append(digests)
    # The change happens once, in the middle, and never turns back.
    assert seen[0] == before
    assert seen[-1] == after
    assert [s for i, s in enumerate(seen) if i == 0 or s != seen[i - 1]] == [before, after]


def test_two_threads_upload_the_same_content(
    registry: AdapterRegistry, adapter: Path, home: Path
) -> None:
    barrier, outcomes = threading.Barrier(4), []

    def upload(name: str) -> None:
        barrier.wait()
        outcomes.append(publish(registry, name, adapter))

    threads = [threading.Thread(target=upload, args=(name,)) for name in ("a", "a", "b", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((o.passport.name, o.created) for o in outcomes) == [
        ("a", False),
        ("a", True),
        ("b", False),
        ("b", True),
    ]
    assert_clean(home, {outcomes[0].passport.version})


def test_threads_lease_and_replace_at_once(
    registry: AdapterRegistry, adapter: Path, changed: Path, home: Path
) -> None:
    publish(registry, "ner", adapter)
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            for _ in range(10):
                work()
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        with registry.lease("ner") as lease:
            assert registry.load(lease.version.digest)

    def swap() -> None:
        publish(registry, "ner", changed)
        publish(registry, "ner", adapter)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, swap)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_clean(home, {registry.resolve("ner").digest})


@pytest.fixture
def shipped(adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shipped"
    copy_adapter(adapter, folder / "ner")
    (folder / "not-an-adapter").mkdir()
    (folder / "README.md").write_text("x")
    return folder


def test_shipped_adapters_are_published_once(
    home: Path, geometry: BaseGeometry, shipped: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        assert registry.import_shipped(shipped) == ["ner"]
        assert registry.import_shipped(shipped) == []
    with AdapterRegistry(home, geometry) as registry:
        assert registry.import_shipped(shipped) == []
        assert names(registry) == ["ner"]
        assert kinds(registry, "ner") == [EventKind.SHIPPED]


def test_a_shipped_adapter_that_was_deleted_stays_deleted(
    home: Path, geometry: BaseGeometry, shipped: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        registry.import_shipped(shipped)
        registry.delete("ner")
    edit_config(shipped / "ner", lora_alpha=3)
    with AdapterRegistry(home, geometry) as registry:
        assert registry.import_shipped(shipped) == []
        assert names(registry) == []


@pytest.mark.parametrize("owner", ["the package", "the user"])
def test_a_shipped_adapter_that_the_disk_lost_comes_back(
    owner: str, home: Path, geometry: BaseGeometry, shipped: Path, changed: Path
) -> None:
    with AdapterRegistry(home, geometry) as registry:
        registry.import_shipped(shipped)
        if owner == "the user":
            publish(registry, "ner", changed)
        digest = registry.resolve("ner").digest
    os.truncate(home / "adapters" / digest / WEIGHTS_FILE, 100)
    with AdapterRegistry(home, geometry) as registry:
        back = ["ner"] if owner == "the package" else []
        assert registry.import_shipped(shipped) == names(registry) == back


def test_a_new_release_replaces_its_own_adapter_only(
    registry: AdapterRegistry, shipped: Path, changed: Path
) -> None:
    copy_adapter(shipped / "ner", shipped / "mine")
    publish(registry, "mine", changed)
    assert registry.import_shipped(shipped) == ["ner"]
    edit_config(shipped / "ner", lora_alpha=3)
    assert registry.import_shipped(shipped) == ["ner"]
    assert registry.resolve("ner").passport.scaling == 3 / 4
    publish(registry, "ner", changed)
    edit_config(shipped / "ner", lora_alpha=5)
    assert registry.import_shipped(shipped) == []
    assert registry.resolve("ner").digest == registry.resolve("mine").digest


def test_shipped_adapters_of_another_base_are_skipped(
    home: Path, geometry: BaseGeometry, shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(geometry, model_id="org/other")
    with caplog.at_level(logging.INFO), AdapterRegistry(home, other) as registry:
        assert registry.import_shipped(shipped) == []
    assert "shipped adapter 'ner' skipped: The adapter was trained on" in caplog.text


def test_a_broken_shipped_adapter_is_an_error(registry: AdapterRegistry, shipped: Path) -> None:
    (shipped / "ner" / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(InvalidAdapter):
        registry.import_shipped(shipped)


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, dynamic_lora_adapters\n"
        "print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert output.stdout.decode().strip() == "[]"


def test_exports_are_sorted_and_there() -> None:
    assert package.__all__ == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)


def test_loaded_factors_are_the_files(registry: AdapterRegistry, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    factors = registry.load(publish(registry, "ner", adapter).passport.version).linears
    for path, factor in factors.items():
        key = f"base_model.model.{path}.lora_"
        assert factor.a is not None
        assert factor.b is not None
        assert torch.equal(factor.a, tensors[f"{key}A.weight"])
        assert torch.equal(factor.b, tensors[f"{key}B.weight"] * 2)


def test_an_adapter_is_read_against_the_base(
    model: LlamaForCausalLM, geometry: BaseGeometry, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True)
    folder = save_adapter(tmp_path / "dora", model, config)
    with AdapterRegistry(
        tmp_path / "home", geometry, base=ModelWeights(model), dtype=torch.bfloat16
    ) as registry:
        passport = publish(registry, "tone", folder).passport
        terms = registry.load(passport.version)
    assert passport.features == ["scale"]
    assert all(term.scale is not None for term in terms.linears.values())
    assert 1e-5 < passport.self_check < 0.05
    with AdapterRegistry(tmp_path / "home", geometry, base=ModelWeights(model)) as registry:
        assert registry.resolve("tone").passport == passport
