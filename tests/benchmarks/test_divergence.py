"""How far rounding moves distributions: the measure itself, and what it is applied to."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.divergence import (
    WAYS,
    AdaptedLayer,
    Holds,
    Layer,
    divergence,
    in_eight_bits,
    log_probabilities,
    native,
    replace_linears,
)
from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.native.product import rounds_pairs
from tests.support.adapters import load_with_peft, make_adapter
from tests.support.models import tiny_llama

REASON = obstacle(ProductKind.W8A8, torch.ones(8, 8))


def test_divergence_is_the_mean_over_tokens_of_all_texts() -> None:
    exact = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    first = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    same = torch.tensor([[0.3, 0.7]]).log()
    assert divergence([exact, same], [other, same]) == pytest.approx(float(first) / 3)
    assert divergence([exact], [exact]) == 0


@pytest.mark.parametrize("size", [4, 32, None])
def test_groups_have_scales_of_their_own(size: int | None) -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    rounded = in_eight_bits(x, size)
    for part, other in zip(x.split(size or 70, -1), rounded.split(size or 70, -1), strict=True):
        half = part.abs().amax(-1, keepdim=True) / 127 / 2
        assert torch.all((part - other).abs() <= half * 1.001)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_all_linear_layers_are_replaced_and_finer_scales_diverge_less() -> None:
    text = [(torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist(), 1)]
    exact = log_probabilities(tiny_llama().eval(), text)

    def of(name: str) -> float:
        model = tiny_llama().eval()
        replace_linears(model, WAYS[name])
        assert not any(isinstance(module, nn.Linear) for module in model.modules())
        assert sum(isinstance(module, Layer) for module in model.modules()) == 2 * 7 + 1
        return divergence(exact, log_probabilities(model, text))

    # Steps that two neighbours share are up to twice as large; rows are hardly longer than groups.
    allowed = 4 if rounds_pairs() else 1
    assert 0 < of("int8") < of("w8a8") < allowed * of("a scale for a row of inputs")


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_an_adapters_layers_are_left_alone() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(4, 4)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})

    model = Wrapped()
    replace_linears(model, native(ProductKind.W8A8))
    assert isinstance(model.base_layer, Layer)
    assert isinstance(model.lora_A["default"], nn.Linear)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("kind", [ProductKind.INT8, ProductKind.W8A8])
@pytest.mark.parametrize("holds", Holds)
def test_adapters_are_computed_as_the_server_does(
    kind: ProductKind, holds: Holds, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=4, targets="all-linear")
    text = [(torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist(), 1)]
    adapted = load_with_peft(tiny_llama(), {"a": folder}).eval()
    with_it, without = (log_probabilities(model, text) for model in (adapted, tiny_llama().eval()))
    rounded = load_with_peft(tiny_llama(), {"a": folder}).eval()
    replace_linears(rounded, native(kind), kind, holds)
    assert any(isinstance(module, AdaptedLayer) for module in rounded.modules())
    found = log_probabilities(rounded, text)
    expected, other = (without, with_it) if holds is Holds.ANOTHER else (with_it, without)
    assert divergence(expected, found) < divergence(other, found) / 10
