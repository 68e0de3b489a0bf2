"""This project's own server, started as a user starts it, with adapters uploaded over HTTP."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from benchmarks.errors import PeerUnavailable
from benchmarks.peers.base import TIMEOUT_S, HttpSession, Session, Setup
from benchmarks.peers.process import free_port, running
from benchmarks.wire import DynamicLoraWire

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def upload(url: str, folders: list[Path]) -> list[str]:
    """Upload PEFT folders under their own names. Raises PeerUnavailable on a refusal."""
    for folder in folders:
        files = [("files", (name, (folder / name).read_bytes())) for name in _FILES]
        answer = httpx.post(
            f"{url}/adapters",
            data={"name": folder.name},
            files=files,
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        if answer.status_code not in {200, 201}:
            raise PeerUnavailable(
                f"{folder.name} was refused: {answer.status_code} {answer.text[:300]}"
            )
    return [folder.name for folder in folders]


@dataclass(frozen=True, slots=True)
class DynamicLora:
    """`dynamic-lora serve` from this environment, its store in a temporary folder."""

    name: str = "dynamic-lora"

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Start, upload, and end on leaving. Raises PeerUnavailable with the reason."""
        url = f"http://127.0.0.1:{(port := free_port())}"
        with tempfile.TemporaryDirectory() as home:
            command = [str(Path(sys.executable).with_name("dynamic-lora")), "serve"]
            command += ["--host", "127.0.0.1", "--port", str(port), "--home", home]
            command += ["--model", str(setup.base), "--dtype", setup.dtype]
            with running(command, ready_url=f"{url}/ready", log=setup.logs / f"{self.name}.log"):
                names = upload(url, setup.adapters)
                yield HttpSession(
                    url=url,
                    wire=DynamicLoraWire(names),
                    version=f"{version('dynamic-lora')}, {setup.dtype}, over HTTP",
                )
