"""The search for the highest logits in C++, with torch as the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.native.peaks import Peaks
from dynamic_lora_adapters.native.sampling import native_sampling

SAMPLING = native_sampling()
PEAKS = None if SAMPLING is None else SAMPLING.peaks
needs_compiler = pytest.mark.skipif(PEAKS is None, reason="there is no C++ compiler")


def find(logits: torch.Tensor) -> Peaks:
    assert PEAKS is not None
    return PEAKS(logits)


@needs_compiler
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 3000),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4, 1e30]),
)
@settings(deadline=None)
def test_peaks_are_torchs(rows: int, width: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator) * scale
    peaks = find(logits)
    assert peaks.positions.tolist() == logits.argmax(dim=-1).tolist()
    assert peaks.heights.tolist() == logits.amax(dim=-1).tolist()
    below = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(
        peaks.log_masses.double(), below.logsumexp(dim=-1), rtol=1e-6, atol=1e-6
    )


@needs_compiler
def test_the_first_of_equal_ones_is_the_highest() -> None:
    logits = torch.zeros(2, 700)
    logits[0, [13, 600]] = 2.0
    assert find(logits).positions.tolist() == [13, 0]


@needs_compiler
def test_a_view_is_read_as_it_is() -> None:
    logits = torch.randn(6, 90)
    assert find(logits[::2, 3:40]).positions.tolist() == logits[::2, 3:40].argmax(dim=-1).tolist()


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_what_is_no_finite_number_shows_in_its_row_alone(value: float, place: int) -> None:
    logits = torch.randn(3, 100)
    logits[1, place] = value
    assert find(logits).log_masses.isfinite().tolist() == [True, False, True]


@needs_compiler
def test_minus_infinity_counts_for_nothing() -> None:
    logits = torch.full((2, 40), float("-inf"))
    logits[0, 33] = 1.5
    peaks = find(logits)
    assert [found[0].item() for found in peaks] == [33, 1.5, 0.0]
    assert not peaks.log_masses[1].isfinite()
