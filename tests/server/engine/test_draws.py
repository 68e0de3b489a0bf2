"""Draws in C++, with the sampler's own in torch as the oracle: the same noise, the same tokens."""

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.native.draws import Draw
from dynamic_lora_adapters.native.sampling import native_sampling
from dynamic_lora_server.engine.sampling import sampler
from dynamic_lora_server.engine.sampling.noise import draw_key, gumbel

SAMPLING = native_sampling()
needs_compiler = pytest.mark.skipif(SAMPLING is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")


def native(logits: torch.Tensor, draws: Seq[Draw]) -> list[int]:
    assert SAMPLING is not None
    tokens: list[int] = SAMPLING.draws(logits, draws).tolist()
    return tokens


def of_torch(logits: torch.Tensor, draws: Seq[Draw]) -> list[int]:
    rows = [draw.row for draw in draws]
    tokens: list[int] = sampler._draw(logits[rows], draws).tolist()
    return tokens


def random_logits(rows: int, width: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def draws_of(rows: Seq[int], *, seed: int, temperature: float, **filters: Any) -> list[Draw]:
    """Draw i is from row `rows[i]`, with a key of its own."""
    return [
        Draw(row=row, key=draw_key(seed, i), temperature=temperature, **filters)
        for i, row in enumerate(rows)
    ]


def margins(logits: torch.Tensor, draws: Seq[Draw]) -> torch.Tensor:
    """By how much the winner leads, [num_draws], where nothing is filtered."""
    scaled = logits[[draw.row for draw in draws]] / torch.tensor(
        [[draw.temperature] for draw in draws]
    )
    noisy = scaled + gumbel([draw.key for draw in draws], logits.shape[1], CPU)
    best = noisy.topk(min(2, logits.shape[1]), dim=-1).values
    return best[:, 0] - best[:, -1]


@needs_compiler
@given(
    width=st.integers(2, 3000),
    scale=st.sampled_from([0.0, 0.3, 3.0, 100.0]),
    temperature=st.floats(0.01, 100),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_plain_draws_are_torchs(width: int, scale: float, temperature: float, seed: int) -> None:
    logits = random_logits(4, width, scale, seed)
    draws = draws_of([0, 1, 2, 3] * 2, seed=seed, temperature=temperature)
    # Where two are this close, the two libraries' logarithms may differ in who is first.
    clear = (margins(logits, draws) > 1e-4).tolist()
    tokens = zip(native(logits, draws), of_torch(logits, draws), clear, strict=True)
    assert all(one == other for one, other, sure in tokens if sure)
    assert any(clear)


@needs_compiler
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 9_999},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 300, "top_p": 0.8},
        {"top_p": 0.95, "min_p": 0.02},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.1},
        {"top_k": 9_000, "top_p": 0.97, "min_p": 1e-4},
    ],
    ids=str,
)
def test_filtered_draws_are_torchs(filters: dict[str, float], scale: float) -> None:
    """Many draws of each row, so that what is kept shows to its edge."""
    logits = random_logits(2, 10_000, scale)
    draws = draws_of([0, 1] * 200, seed=7, temperature=1.2, **filters)
    expected = of_torch(logits, draws)
    assert native(logits, draws) == expected
    if filters not in ({"top_k": 1}, {"min_p": 1.0}):
        assert len(set(expected)) > 2


@needs_compiler
def test_the_first_of_equal_tokens_are_kept() -> None:
    logits = torch.zeros(1, 1000)
    draws = draws_of([0] * 200, seed=1, temperature=1.0, top_k=3)
    assert set(native(logits, draws)) == {0, 1, 2}
    draws = draws_of([0] * 200, seed=1, temperature=1.0, top_p=0.0045)
    assert set(native(logits, draws)) == {0, 1, 2, 3, 4}


@needs_compiler
def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    logits = torch.full((1, 500), float("-inf"))
    logits[0, [3, 77, 499]] = torch.tensor([0.0, 1.0, -2.0])
    for filters in ({}, {"top_k": 400}, {"top_p": 1 - 1e-7}, {"min_p": 1e-30}):
        draws = draws_of([0] * 300, seed=2, temperature=3.0, **filters)
        assert set(native(logits, draws)) == {3, 77, 499}, filters


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_a_row_without_sense_gives_some_token(value: float, filters: dict[str, float]) -> None:
    """Others in the batch are drawn as ever; the sampler knows the row by its log mass."""
    logits = random_logits(2, 100, 1.0)
    logits[0] = value
    draws = draws_of([0, 1], seed=3, temperature=1.0, **filters)
    odd, sound = native(logits, draws)
    assert 0 <= odd < 100
    assert [sound] == of_torch(logits, draws[1:])


@needs_compiler
def test_draws_of_no_rows_and_of_views() -> None:
    logits = random_logits(6, 300, 2.0)
    assert native(logits, []) == []
    draws = draws_of([0, 1, 2], seed=4, temperature=1.0)
    view = logits[::2, 10:200]
    assert native(view, draws) == of_torch(view, draws)
