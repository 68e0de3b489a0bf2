import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters import AdapterTerms, BaseGeometry, InvalidAdapter, LinearTerms
from dynamic_lora_adapters.geometry import LinearShape
from dynamic_lora_adapters.home.self_check import self_check

GEOMETRY = BaseGeometry(
    model_id="x", model_type="x", num_layers=1, linears={"layer": LinearShape(24, 40)}, modules={}
)


def terms(seed: int = 0) -> LinearTerms:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LinearTerms(
        a=random(4, 24), b=random(40, 4), scale=random(40), dense=random(40, 24), bias=random(40)
    )


def check(term: LinearTerms, dtype: torch.dtype) -> float:
    return self_check(AdapterTerms(linears={"layer": term}), GEOMETRY, dtype)


@given(st.integers(0, 1000))
def test_the_difference_is_that_of_the_number_format(seed: int) -> None:
    assert 0 < check(terms(seed), torch.float32) < 1e-6
    assert 1e-4 < check(terms(seed), torch.bfloat16) < 0.05


@given(st.integers(0, 1000))
def test_factors_of_a_shorter_format_show(seed: int) -> None:
    low_rank = dataclasses.replace(terms(seed), scale=None, dense=None, bias=None)
    checked = AdapterTerms(linears={"layer": low_rank})
    assert 1e-4 < self_check(checked, GEOMETRY, torch.float32, torch.bfloat16) < 0.02
    assert self_check(checked, GEOMETRY, torch.float32, torch.float32) < 1e-6


def test_a_small_scaling_takes_nothing_from_float16() -> None:
    term = dataclasses.replace(terms(), scale=None, dense=None, bias=None)
    assert term.b is not None
    small = dataclasses.replace(term, b=term.b * 1e-3 / 256)
    assert check(small, torch.float16) < 2 * check(term, torch.float16)


def test_the_same_adapter_gets_the_same_figure() -> None:
    assert check(terms(), torch.bfloat16) == check(terms(), torch.bfloat16)


@pytest.mark.parametrize("part", ["a and b", "scale", "dense", "bias"])
def test_every_part_is_probed(part: str) -> None:
    """One value that bfloat16 cannot hold shows, wherever it is."""
    zero = LinearTerms(
        a=torch.ones(1, 24),
        b=torch.zeros(40, 1),
        scale=torch.zeros(40),
        dense=torch.zeros(40, 24),
        bias=torch.zeros(40),
    )
    assert check(zero, torch.bfloat16) == 0
    name = "b" if part == "a and b" else part
    parts: dict[str, Any] = {name: torch.full_like(getattr(zero, name), 1.00001)}
    spoilt = dataclasses.replace(zero, **parts)
    assert check(spoilt, torch.bfloat16) > 0


def test_an_adapter_without_linear_layers_has_nothing_to_lose() -> None:
    assert self_check(AdapterTerms(), GEOMETRY, torch.float16) == 0.0


def test_a_delta_that_overflows_is_refused() -> None:
    large = LinearTerms(a=torch.ones(1, 24), b=torch.full((40, 1), 1e6))
    assert check(large, torch.float32) < 1e-6
    with pytest.raises(InvalidAdapter, match="The delta on 'layer' overflows in float16") as caught:
        check(large, torch.float16)
    assert caught.value.field == "layer"


@given(st.integers(0, 1000))
def test_factors_of_eight_bits_show(seed: int) -> None:
    low_rank = dataclasses.replace(terms(seed), scale=None, dense=None, bias=None)
    checked = AdapterTerms(linears={"layer": low_rank})
    assert 1e-3 < self_check(checked, GEOMETRY, torch.float32, torch.uint8) < 0.03
