"""The search for the highest logits without logits; the product that writes them is the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynamic_lora_adapters.apply.products import ProductKind, make_product, obstacle
from dynamic_lora_adapters.native.head import Highest, NativeHead
from dynamic_lora_adapters.native.norm import NativeRmsNorm
from dynamic_lora_adapters.native.product import NativeProduct

KINDS = [ProductKind.NATIVE, ProductKind.BF16, ProductKind.INT8, ProductKind.W8A8]
pytestmark = pytest.mark.skipif(
    obstacle(ProductKind.NATIVE, torch.ones(1, 1)) is not None, reason="there is no C++ compiler"
)


def make_norm(width: int) -> NativeRmsNorm:
    norm = nn.RMSNorm(width)
    norm.weight.data = torch.linspace(0.5, 1.5, width)
    return NativeRmsNorm(norm, 1e-5, 0.0)


def find(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    kind: ProductKind = ProductKind.NATIVE,
    with_logprobs: bool = False,
) -> tuple[Highest, torch.Tensor]:
    """What is found, and the logits as the product writes them."""
    norm, product = make_norm(weight.shape[1]), make_product(kind, weight, bias)
    assert isinstance(product, NativeProduct)
    found = NativeHead(norm, product)(hidden, rows, with_logprobs=with_logprobs)
    return found, product(norm(hidden[rows]))


@pytest.mark.parametrize("kind", KINDS)
@given(
    num_rows=st.integers(1, 70),
    vocab=st.integers(1, 300),
    width=st.one_of(st.integers(1, 130), st.just(1024)),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
@torch.inference_mode()
def test_the_highest_is_torchs(
    kind: ProductKind, num_rows: int, vocab: int, width: int, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator)
    hidden = torch.randn(num_rows + 3, width, generator=generator)
    bias = torch.randn(vocab, generator=generator) if biased else None
    rows = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
    found, logits = find(weight, hidden, rows, bias=bias, kind=kind)
    assert found.positions.tolist() == logits.argmax(dim=-1).tolist()
    assert found.verdicts[1].tolist() == [1] * num_rows
    assert found.log_masses is None
    reported, _ = find(weight, hidden, rows, bias=bias, kind=kind, with_logprobs=True)
    assert torch.equal(reported.verdicts, found.verdicts)
    assert reported.log_masses is not None
    expected = logits.double().log_softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(-reported.log_masses.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(first=st.integers(0, 199), second=st.integers(0, 199))
@settings(deadline=None)
@torch.inference_mode()
def test_the_first_of_equal_ones_is_the_highest(kind: ProductKind, first: int, second: int) -> None:
    weight = torch.full((200, 16), -1.0)
    weight[[first, second]] = 1.0
    found, _ = find(weight, torch.ones(3, 16), torch.arange(3), kind=kind)
    assert found.positions.tolist() == [min(first, second)] * 3


@torch.inference_mode()
def test_all_below_zero_in_a_last_panel_that_is_not_whole() -> None:
    weight = -torch.arange(40, 0, -1.0)[:, None].expand(40, 16)
    found, _ = find(weight, torch.ones(2, 16), torch.arange(2))
    assert found.positions.tolist() == [39, 39]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
@torch.inference_mode()
def test_what_is_no_finite_number_shows_in_its_row_alone(value: float, place: int) -> None:
    weight = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(100)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    hidden[1] = value
    found, _ = find(weight, hidden, torch.arange(3), with_logprobs=True)
    assert found.verdicts[1].tolist() == [1, 0, 1]
    assert found.log_masses is not None
    assert found.log_masses.isnan().tolist() == [False, True, False]
    bias[place] = value
    found, _ = find(weight, hidden[:1], torch.tensor([0, 0]), bias=bias)
    assert found.verdicts[1].tolist() == [0, 0]


@torch.inference_mode()
def test_minus_infinity_is_unsound_only_where_there_is_nothing_else() -> None:
    weight = torch.ones(100, 16)
    bias = torch.full((100,), -float("inf"))
    found, _ = find(weight, torch.ones(1, 16), torch.tensor([0]), bias=bias)
    assert found.verdicts[1].tolist() == [0]
    bias[70] = -1e30
    found, _ = find(weight, torch.ones(1, 16), torch.tensor([0]), bias=bias, with_logprobs=True)
    assert found.verdicts.tolist() == [[70], [1]]
    assert found.log_masses is not None
    assert found.log_masses.tolist() == [0.0]


@torch.inference_mode()
def test_how_likely_a_token_is_depends_on_no_thread() -> None:
    """In a vocabulary of hundreds of panels."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(number, 16, generator=generator) for number in (5000, 9))
    norm, product = make_norm(16), make_product(ProductKind.NATIVE, weight, None)
    assert isinstance(product, NativeProduct)
    head, rows, usual = NativeHead(norm, product), torch.arange(9), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = head(hidden, rows, with_logprobs=True).log_masses
    finally:
        torch.set_num_threads(usual)
    assert alone is not None
    expected = product(norm(hidden)).double().log_softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(-alone.double(), expected, rtol=1e-5, atol=1e-5)
    for _ in range(20):
        found = head(hidden, rows, with_logprobs=True).log_masses
        assert found is not None
        assert found.equal(alone)
