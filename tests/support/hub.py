"""A Hub without a network: repositories are folders, and downloads wait for a gate."""

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError


class FakeHub:
    """What takes the place of the Hub's client; `asked` are the repositories it was asked for.

    Downloads wait while `gate` is not set; `failure` is raised instead of an answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def model_info(self, repo: str, **_: Any) -> SimpleNamespace:
        """As `HfApi.model_info`."""
        self.asked.append(repo)
        if self.failure is not None:
            raise self.failure
        folder = self.repositories.get(repo)
        if folder is None:
            answer: Any = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            raise RepositoryNotFoundError("404 Client Error.", response=answer)
        files = [
            SimpleNamespace(rfilename=path.name, size=path.stat().st_size)
            for path in folder.iterdir()
        ]
        return SimpleNamespace(siblings=files, sha="0" * 40)

    def hf_hub_download(self, repo: str, name: str, *, local_dir: Path, **_: Any) -> None:
        """As `HfApi.hf_hub_download`."""
        assert self.gate.wait(60)
        shutil.copy(self.repositories[repo] / name, local_dir / name)


def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A Hub that has nothing yet, in the place of the real one."""
    hub = FakeHub()
    for name in ("model_info", "hf_hub_download"):
        method = getattr(hub, name)
        monkeypatch.setattr(
            HfApi, name, lambda _, *args, method=method, **kwargs: method(*args, **kwargs)
        )
    return hub
