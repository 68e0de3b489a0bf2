"""The version that the server says it is."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from dynamic_lora_server import version as versions
from dynamic_lora_server.version import own_version


def test_it_is_that_of_the_distribution() -> None:
    assert own_version() == version("dynamic-lora")


def test_a_checkout_that_is_not_installed_has_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    assert own_version() == "0+checkout"
