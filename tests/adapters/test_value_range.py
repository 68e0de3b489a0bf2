"""How large values may be, by where they are and by the number format."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dynamic_lora_adapters import AdapterTerms, InvalidAdapter, LinearTerms
from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.kernels.rank_concat import RankConcat
from dynamic_lora_adapters.segments import Run
from dynamic_lora_adapters.terms import EmbeddingTerms, ModuleOverride, PromptTerms
from dynamic_lora_adapters.value_range import balanced, check_range, find_too_large
from tests.support.slabs import make_slab

ONES = torch.ones(2, 2)


def places(value: float) -> dict[str, AdapterTerms]:
    """Terms whose values are `value`, at one place each, by what errors call the place."""
    full = torch.full((2, 2), value)
    linear = LinearTerms(a=ONES, b=ONES)
    embedding = EmbeddingTerms(a=ONES, b=ONES)
    parts = {
        "'a'": replace(linear, a=full),
        "'b'": replace(linear, b=full),
        "'scale'": LinearTerms(scale=full[0]),
        "'dense'": LinearTerms(dense=full),
        "'bias'": LinearTerms(bias=full[0]),
    }
    tables = {
        "'table.a'": replace(embedding, a=full),
        "'table.b'": replace(embedding, b=full),
        "'rows'": EmbeddingTerms(token_ids=torch.tensor([3, 1]), rows=full),
    }
    prompts = {
        "the virtual tokens": PromptTerms(num_tokens=2, embeddings=full),
        "the virtual tokens' keys in layer 1": PromptTerms(
            num_tokens=2, keys=(ONES, full), values=(ONES, ONES)
        ),
        "the virtual tokens' values in layer 0": PromptTerms(
            num_tokens=2, keys=(ONES, ONES), values=(full, ONES)
        ),
    }
    return {
        **{name: AdapterTerms(linears={name.strip("'"): part}) for name, part in parts.items()},
        **{name: AdapterTerms(embeddings={name.strip("'"): part}) for name, part in tables.items()},
        **{name: AdapterTerms(prompt=part) for name, part in prompts.items()},
        "'norm.weight'": AdapterTerms(
            overrides={"norm": ModuleOverride(parameters={"weight": full[0]})}
        ),
    }


@pytest.mark.parametrize("place", places(1.0))
def test_large_values_are_refused_wherever_they_are(place: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_range(places(2000.0)[place], dtype)
    for value in (1e38, -3e38, math.inf, math.nan):
        with pytest.raises(InvalidAdapter, match=f"values for {place} reach") as caught:
            check_range(places(value)[place], torch.float32)
        assert caught.value.field == place.strip("'")
    check_range(places(60000.0)[place], torch.float32)
    with pytest.raises(InvalidAdapter) as caught:
        check_range(places(60000.0)[place], torch.float16)
    assert caught.value.message == (
        f"The adapter's values for {place} reach 6e+04, which is too large to compute with in "
        "float16."
    )


def test_factors_count_together() -> None:
    term = LinearTerms(a=torch.full((1, 4), 1e5), b=torch.full((3, 1), 1e5))
    found = find_too_large(AdapterTerms(linears={"layer": term}), torch.float32)
    assert found is not None
    assert found[0] == "'layer'"
    assert found[1] == pytest.approx(4e10)
    nothing = LinearTerms(a=torch.zeros(0, 4), b=torch.zeros(3, 0))
    assert find_too_large(AdapterTerms(linears={"layer": nothing}), torch.float32) is None


@given(st.floats(width=32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_what_passes_reaches_no_other_adapters_rows(value: float, dtype: torch.dtype) -> None:
    """The mask multiplies with 0, which no infinity or NaN survives: none may get that far."""
    factors = LinearTerms(a=torch.full((1, 2), value), b=torch.full((3, 1), value))
    if find_too_large(AdapterTerms(linears={"layer": factors}), dtype) is not None:
        return
    assert factors.a is not None and factors.b is not None
    a = torch.stack([torch.ones(1, 2), factors.a]).to(dtype)
    b = torch.stack([torch.ones(1, 3), factors.b.T]).to(dtype)
    out = torch.zeros(2, 3, dtype=dtype)
    RankConcat()(
        out,
        torch.ones(2, 2, dtype=dtype),
        SlotFactors(a, b),
        Run(make_slab(2, 1, 2, 3), 0, 0, [2, 0]),
    )
    assert out.tolist() == [[2.0] * 3] * 2


@given(
    st.floats(width=32),
    st.floats(width=32),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@example(4093.0, 1.0, torch.float16)
@example(8188.5, 1.0, torch.float16)
@example(1.0, math.nan, torch.float32)
@example(1e4, 2.4e3, torch.float32)
@example(1e4, 2.6e3, torch.float32)
def test_the_look_at_norms_decides_nothing_that_the_values_do_not(
    in_a: float, in_b: float, dtype: torch.dtype
) -> None:
    a, b = torch.zeros(2, 4), torch.zeros(3, 2)
    a[0], b[2, 0] = in_a, in_b
    found = find_too_large(AdapterTerms(linears={"layer": LinearTerms(a=a, b=b)}), dtype)
    largest = min(1e8, torch.finfo(dtype).max / 8)
    sound = all(abs(value) <= largest for value in (in_a, in_b)) and abs(4 * in_a * in_b) <= 1e8
    assert (found is None) == sound


def test_balancing_changes_no_product_and_leaves_larger_values_of_b() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 20, generator=generator), torch.randn(6, 30, generator=generator)
    b *= torch.tensor([1.0, 1e-6, 1e6, 0.0, 1e-3, 1e-30])[:, None]
    a[2] = 0
    small_a, large_b = balanced(a, b)
    assert (small_a[:, :, None] * large_b[:, None]).equal(a[:, :, None] * b[:, None])
    for rank in (1, 4, 5):
        assert 0.5 <= float(small_a[rank].abs().max() / large_b[rank].abs().max()) <= 2
    for rank in (2, 3):
        assert small_a[rank].equal(a[rank])
        assert large_b[rank].equal(b[rank])
