"""What sampling does without a C++ compiler."""

import pytest

from dynamic_lora_adapters.native import draws
from dynamic_lora_adapters.native.library import NativeUnavailable
from dynamic_lora_adapters.native.sampling import native_sampling


def test_without_a_compiler_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise NativeUnavailable(f"no compiler for {name}")

    monkeypatch.setattr(draws, "load_library", missing)
    caplog.set_level("INFO")
    assert native_sampling() is None
    assert "Sampling is torch's: no compiler for " in caplog.text
    caplog.clear()
    assert native_sampling(wanted=False) is None
    assert not caplog.text
