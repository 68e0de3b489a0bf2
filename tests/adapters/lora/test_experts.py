from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

import dynamic_lora_adapters.lora.patterns as patterns
from dynamic_lora_adapters import (
    AdapterTerms,
    InvalidAdapter,
    LoraSpec,
    UnsupportedAdapter,
    read_adapter,
)
from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.files.json_file import read_json_object
from tests.support.adapters import edit_config, load_with_peft, save_adapter
from tests.support.apply_terms import logits
from tests.support.geometry import geometry_of
from tests.support.lora_terms import check_against_peft, lora, refused
from tests.support.models import TINY_MOE_MODELS
from tests.support.uploads import edit_tensors

PROMPT = torch.tensor([5, 17, 250, 3, 42, 42, 7, 19, 101, 8])
EXPERTS = "model.layers.0.mlp.experts"


def read(folder: Path, model: PreTrainedModel) -> AdapterTerms:
    spec = LoraSpec.parse(read_json_object(folder / "adapter_config.json"))
    return read_adapter(folder, spec, geometry_of(model), ModelWeights(model))


def tiny_gpt_oss() -> GptOssForCausalLM:
    """A model whose experts are stored as [in, out], with unequal sizes so that it shows."""
    config = GptOssConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=32,
        layer_types=["full_attention"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GptOssForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    model.train(False)
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY_MOE_MODELS["qwen3_moe"]()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=[],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
    )
    return save_adapter(tmp_path, model, config)


def test_the_new_parameters_are_the_bases_plus_the_delta(
    folder: Path, model: PreTrainedModel
) -> None:
    parameters = read(folder, model).overrides[EXPERTS].parameters
    assert parameters.keys() == {"down_proj", "gate_up_proj"}
    peft_model = load_with_peft(model, {"default": folder}).merge_and_unload()
    for name, value in parameters.items():
        torch.testing.assert_close(value, peft_model.get_parameter(f"{EXPERTS}.{name}").data)


def test_transposed_experts(tmp_path: Path) -> None:
    model = tiny_gpt_oss()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
    )
    folder = save_adapter(tmp_path, model, config)
    with torch.no_grad():
        peft_model = load_with_peft(model, {"default": folder})
        expected = peft_model(input_ids=PROMPT[None]).logits[0]
        plain = model(input_ids=PROMPT[None]).logits[0]
    assert (expected - plain).abs().max() > 0.01
    found = logits(model, read(folder, model), PROMPT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_factors_of_another_rank_are_refused(folder: Path, model: PreTrainedModel) -> None:
    edit_config(folder, r=2)
    with pytest.raises(InvalidAdapter, match=r"has shape \[16, .* the config gives this module"):
        read(folder, model)


def test_a_missing_factor_is_refused(folder: Path, model: PreTrainedModel) -> None:
    name = f"base_model.model.{EXPERTS}.base_layer.lora_B.weight"
    edit_tensors(folder, lambda t: t.pop(name))
    with pytest.raises(InvalidAdapter, match=f"'{name}' is missing"):
        read(folder, model)


def test_vectors_take_no_factors(folder: Path, model: PreTrainedModel) -> None:
    edit_config(folder, target_parameters=["model.norm.weight"])
    with pytest.raises(UnsupportedAdapter, match="'model.norm.weight', which has 1 dimensions"):
        read(folder, model)


# Where transformers 4 had the experts of each family, and their layers: in, in, out.
SINGLE = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 48),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 96),
}


def save_single(
    folder: Path, model: PreTrainedModel, family: str, *, router: bool = False, **keys: Any
) -> None:
    """Save an adapter of every expert by itself, as PEFT did under transformers 4."""
    parent, leaves, width = SINGLE[family]
    save_adapter(folder, model, lora(target_modules=["q_proj"]))
    edit_config(folder, **{"target_modules": ["q_proj", *leaves, *["gate"] * router], **keys})
    shapes = {
        f"experts.{expert}.{leaf}": (width, 64) if leaf == leaves[-1] else (64, width)
        for expert, leaf in product(range(4), leaves)
    }
    if router:
        shapes["gate"] = (64, 4)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for layer, (below, (inner, outer)) in product(range(2), shapes.items()):
            path = f"base_model.model.model.layers.{layer}.{parent}.{below}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, inner, generator=generator) * 0.1
            tensors[f"{path}.lora_B.weight"] = torch.randn(outer, 4, generator=generator) * 0.3

    edit_tensors(folder, add)


@pytest.mark.parametrize("family", SINGLE)
@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize(
    "keys", [{}, {"use_rslora": True}, {"lora_alpha": 3, "alpha_pattern": {"q_proj": 8}}]
)
def test_experts_adapted_one_by_one_are_stacked(
    keys: dict[str, Any], router: bool, family: str, tmp_path: Path
) -> None:
    model = TINY_MOE_MODELS[family]()
    save_single(tmp_path, model, family, router=router, **keys)
    check_against_peft(tmp_path, model)


@pytest.mark.parametrize("family", SINGLE)
def test_routers_adapted_as_layers(family: str, tmp_path: Path) -> None:
    """They were layers under transformers 4; no expert has factors here."""
    model = TINY_MOE_MODELS[family]()
    save_single(tmp_path, model, family, router=True, target_modules=["q_proj", "gate"])
    edit_tensors(tmp_path, drop_experts)
    check_against_peft(tmp_path, model)


def drop_experts(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]


def test_single_experts_by_a_pattern(tmp_path: Path) -> None:
    model = TINY_MOE_MODELS["qwen3_moe"]()
    pattern = r".*(q_proj|experts\..*(gate|up|down)_proj)"
    save_single(tmp_path, model, "qwen3_moe", target_modules=pattern)
    check_against_peft(tmp_path, model)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["q_proj", "w1", "w2"], "Cannot convert PEFT target.* w1 without also targeting w3"),
        (["q_proj", "w1", "w3"], "only where all layers of an expert are adapted"),
        ("all-linear", "'all-linear' does not tell which they were"),
    ],
)
def test_single_experts_that_peft_does_not_stack_are_refused(
    targets: list[str] | str, reason: str, tmp_path: Path
) -> None:
    model = TINY_MOE_MODELS["mixtral"]()
    save_single(tmp_path, model, "mixtral", target_modules=targets)
    refused(tmp_path, model, UnsupportedAdapter, f"as transformers 4 had them; .* {reason}")


def test_patterns_for_single_experts_are_proven_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one is slow with nothing but a name that only PEFT makes up."""
    monkeypatch.setattr(patterns, "_PROBE_SECONDS", 1.0)
    model = TINY_MOE_MODELS["mixtral"]()
    slow = r".*q_proj|model\.layers\.0\.mlp\.experts\.w1" + "(|)" * 40 + "!"
    save_single(tmp_path, model, "mixtral", target_modules=slow)
    refused(tmp_path, model, InvalidAdapter, "takes over 1 seconds to match")


def test_a_single_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    model = TINY_MOE_MODELS["mixtral"]()
    save_single(tmp_path, model, "mixtral")
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_B.weight"
    edit_tensors(tmp_path, lambda t: t.pop(name))
    refused(tmp_path, model, InvalidAdapter, f"'{name}' is missing")
