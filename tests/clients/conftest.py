"""Fixtures of the client's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.wire import Wire, serve_wire


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A scripted server on a real socket."""
    with serve_wire() as server:
        yield server


@pytest.fixture
def peft_dir(tmp_path: Path) -> Path:
    """A directory as a trainer leaves it; the content is not looked at by the client."""
    folder = tmp_path / "peft"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x00\x01" * 100_000)
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".cache").write_bytes(b"hidden")
    return folder
