from collections.abc import Mapping

import pytest
import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters import BaseGeometry, UnsupportedAdapter
from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.lora.replaced import Changes, find_changes
from tests.support.geometry import geometry_of
from tests.support.models import TINY_MODELS

C_FC = "transformer.h.1.mlp.c_fc"
LN = "transformer.ln_f"
WTE = "transformer.wte"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY_MODELS["gpt2"]()


def changes_of(
    model: PreTrainedModel,
    differences: Mapping[str, torch.Tensor],
    geometry: BaseGeometry | None = None,
) -> Changes:
    base = ModelWeights(model)
    values = {name: base.parameter(name) + change for name, change in differences.items()}
    return find_changes(values, geometry or geometry_of(model), base)


def test_each_parameter_becomes_what_its_module_takes(model: PreTrainedModel) -> None:
    some_rows = torch.zeros(300, 64)
    some_rows[[5, 9], 3] = 1.0
    changes = changes_of(
        model,
        {
            f"{C_FC}.weight": torch.full((64, 256), 0.5),
            f"{C_FC}.bias": torch.full((256,), 0.25),
            f"{WTE}.weight": some_rows,
            f"{LN}.bias": torch.ones(64),
        },
    )
    torch.testing.assert_close(changes.dense, {C_FC: torch.full((256, 64), 0.5)})
    torch.testing.assert_close(changes.bias, {C_FC: torch.full((256,), 0.25)})
    token_ids, rows = changes.rows[WTE]
    assert token_ids.tolist() == [5, 9]
    torch.testing.assert_close(rows, some_rows[[5, 9]])
    torch.testing.assert_close(
        changes.overrides, {LN: {"bias": model.get_parameter(f"{LN}.bias") + 1}}
    )


def test_equal_values_are_no_change(model: PreTrainedModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    changes = changes_of(model, dict.fromkeys(names, torch.tensor(0.0)))
    assert changes == Changes()
    assert C_FC not in changes


def test_membership_is_by_module(model: PreTrainedModel) -> None:
    changes = changes_of(model, {f"{LN}.weight": torch.tensor(1.0)})
    assert LN in changes
    assert WTE not in changes


def test_other_modules_are_refused(model: PreTrainedModel) -> None:
    name = "transformer.wpe.weight"
    message = rf"a new value for '{name}' \(Embedding\), which is not served"
    with pytest.raises(UnsupportedAdapter, match=message) as caught:
        changes_of(model, {name: torch.tensor(1.0)})
    assert caught.value.field == name


def test_modules_whose_rows_are_not_known_are_refused(model: PreTrainedModel) -> None:
    name = f"{LN}.bias"
    unseen = BaseGeometry.of(model, model_id="x")
    message = rf"for '{LN}' \(LayerNorm\), which was not seen to work on each token by itself"
    with pytest.raises(UnsupportedAdapter, match=message) as caught:
        changes_of(model, {name: torch.tensor(1.0)}, unseen)
    assert caught.value.field == name
