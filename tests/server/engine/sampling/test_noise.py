"""Noise by keys: the numbers of SplitMix64, and standard Gumbel in every direction."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_server.engine.sampling import noise
from dynamic_lora_server.engine.sampling.noise import draw_key, gumbel

CPU = torch.device("cpu")
MASK = 2**64 - 1


def splitmix(key: int, size: int) -> list[int]:
    """As its authors wrote it, in whole numbers."""
    numbers = []
    for _ in range(size):
        key = (key + 0x9E3779B97F4A7C15) & MASK
        bits = key
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(bits ^ (bits >> 31))
    return numbers


def test_the_reference_gives_the_published_numbers() -> None:
    assert splitmix(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=4), st.integers(1, 40))
def test_numbers_are_those_of_splitmix(keys: list[int], size: int) -> None:
    found = noise._splitmix(keys, size, CPU)
    assert [[number & MASK for number in row] for row in found.tolist()] == [
        splitmix(key, size) for key in keys
    ]


def test_a_row_depends_on_its_key_alone() -> None:
    keys = [draw_key(5, index) for index in range(4)]
    together = gumbel(keys, 1000, CPU)
    for row, key in enumerate(keys):
        assert torch.equal(together[row], gumbel([key], 1000, CPU)[0])
    assert torch.equal(together[:, :10], gumbel(keys, 10, CPU))


def test_draws_of_a_sequence_and_of_seeds_have_keys_of_their_own() -> None:
    keys = {draw_key(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(100)}
    assert len(keys) == 300
    assert len(gumbel(sorted(keys), 1, CPU).unique()) > 295


def test_columns_and_rows_are_standard_gumbel() -> None:
    """Kolmogorov and Smirnov's test at 1 in 10,000, along rows and along successive draws."""
    samples = {
        "a row": gumbel([draw_key(0, 0)], 100_000, CPU)[0],
        "a column": gumbel([draw_key(0, index) for index in range(100_000)], 1, CPU)[:, 0],
        "seeds": gumbel([draw_key(seed, 7) for seed in range(100_000)], 3, CPU)[:, 2],
    }
    for name, sample in samples.items():
        expected = (-(-sample.double().sort().values).exp()).exp()
        steps = torch.arange(1, len(sample) + 1) / len(sample)
        distance = float((expected - steps).abs().max())
        assert distance < 2.23 / math.sqrt(len(sample)), name


def test_neighbours_are_not_correlated() -> None:
    rows = gumbel([draw_key(3, index) for index in range(300)], 300, CPU)
    rows = (rows - rows.mean()) / rows.std()
    for left, right in ((rows[:, :-1], rows[:, 1:]), (rows[:-1], rows[1:])):
        # Four standard deviations.
        assert abs(float((left * right).mean())) < 4 / math.sqrt(left.numel())


@pytest.mark.parametrize("bits", [0, MASK, 2**63, 2**24 - 1])
def test_every_number_gives_finite_noise(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = bits - 2**64 if bits >= 2**63 else bits
    monkeypatch.setattr(noise, "_splitmix", lambda *_: torch.tensor([[signed]]))
    assert math.isfinite(float(gumbel([0], 1, CPU)))
