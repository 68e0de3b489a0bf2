import copy

import pytest
import torch
from torch import nn

from dynamic_lora_adapters import BaseGeometry
from dynamic_lora_adapters.apply.inject import inject, observe_groups
from tests.support.models import TINY_MODELS, tiny_llama

IDS = torch.arange(3, 12)[None]


def leaves(path: str) -> str:
    return path.rpartition(".")[2]


def test_layers_with_a_common_input_form_a_group() -> None:
    model = tiny_llama()
    geometry = BaseGeometry.of(model, model_id="tiny")
    groups = observe_groups(model, geometry.linears, lambda: model(IDS))
    names = [tuple(map(leaves, group.paths)) for group in groups]
    layer = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert names == layer * 2
    assert groups[0].widths == (64, 32, 32)
    assert groups[0].out_features == 128


def test_layers_that_the_trial_does_not_reach_stand_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    groups = observe_groups(model, ["used", "idle"], lambda: model["used"](torch.ones(1, 4)))
    assert [group.paths for group in groups] == [("used",), ("idle",)]


def test_layers_that_differ_in_bias_are_not_joined() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)})
    x = torch.ones(1, 4)
    groups = observe_groups(model, ["a", "b"], lambda: (model["a"](x), model["b"](x)))
    assert [group.paths for group in groups] == [("a",), ("b",)]


@pytest.mark.parametrize("family", sorted(set(TINY_MODELS) - {"gpt2"}))
@torch.inference_mode()
def test_injection_without_a_plan_changes_no_logit_and_no_key(family: str) -> None:
    model = TINY_MODELS[family]()
    original = copy.deepcopy(model)
    geometry = BaseGeometry.of(model, model_id="tiny")
    inject(model, observe_groups(model, geometry.linears, lambda: model(IDS)))
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits)
    assert list(model.state_dict()) == list(original.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[key])


def test_joined_weights_are_stored_once() -> None:
    model = tiny_llama()
    before = model.num_parameters()
    geometry = BaseGeometry.of(model, model_id="tiny")
    inject(model, observe_groups(model, geometry.linears, lambda: model(IDS)))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(s.nbytes() for s in storages.values()) == before * 4


def test_only_linear_layers_can_be_wrapped() -> None:
    model = tiny_llama()
    with pytest.raises(TypeError, match=r"model\.norm is a LlamaRMSNorm, not a Linear"):
        observe_groups(model, ["model.norm"], lambda: None)
