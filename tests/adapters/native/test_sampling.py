"""When sampling is in C++: on CPUs, in float32, with a compiler."""

import pytest
import torch

from dynamic_lora_adapters.native import draws
from dynamic_lora_adapters.native.draws import Draw
from dynamic_lora_adapters.native.library import NativeUnavailable
from dynamic_lora_adapters.native.sampling import NativeSampling, native_sampling


def test_other_tensors_are_not_served() -> None:
    assert NativeSampling.serves(torch.zeros(1, 4))
    assert not NativeSampling.serves(torch.zeros(1, 4, dtype=torch.bfloat16))
    assert not NativeSampling.serves(torch.zeros(1, 4, device="meta"))


@pytest.mark.skipif(native_sampling() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("row", [-1, 2])
def test_rows_that_are_not_there_are_refused(row: int) -> None:
    sampling = native_sampling()
    assert sampling is not None
    with pytest.raises(AssertionError):
        sampling.draws(torch.zeros(2, 4), [Draw(row=row, key=0, temperature=1.0)])
    with pytest.raises(AssertionError):
        sampling.draws(torch.zeros(2, 4).bfloat16(), [Draw(row=0, key=0, temperature=1.0)])


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
