"""What is wrong with the files of an adapter is said by the name of the tensor or key."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.errors import (
    AdapterError,
    IncompatibleAdapter,
    InvalidAdapter,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.kinds import read_kind
from tests.adapters.kinds.checkpoints import WEIGHTS, edit_tensors, make, make_config
from tests.support.geometry import geometry_of
from tests.support.models import TINY_MODELS, tiny_llama

Q = "base_model.model.model.layers.0.self_attn.q_proj."
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def refused(
    model: Any,
    folder: Path,
    config: dict[str, Any],
    error: type[AdapterError],
    geometry: BaseGeometry | None = None,
) -> AdapterError:
    geometry = geometry or geometry_of(model)
    with pytest.raises(error) as caught:
        read_kind(folder, config, geometry, ModelWeights(model))
    return caught.value


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "loha": ("LoHaConfig", {}, f"{Q}hada_w1_a"),
    "boft": ("BOFTConfig", {}, f"{Q}boft_R"),
    "vera": ("VeraConfig", {"r": 4}, "base_model.vera_A"),
    "ia3": ("IA3Config", {"feedforward_modules": []}, f"{Q}ia3_l"),
    "shira": ("ShiraConfig", {"r": 2}, f"{Q}shira_weight"),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}, "prompt_embeddings"),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, "prompt_embeddings"),
    "norms": (
        "LNTuningConfig",
        {"target_modules": ["norm"]},
        "base_model.model.model.norm.ln_tuning_layers.weight",
    ),
    "tokens": (
        "TrainableTokensConfig",
        {"token_indices": [3, 4]},
        "base_model.model.model.embed_tokens.trainable_tokens_delta",
    ),
}
EDITS: dict[str, tuple[Callable[[str], Edit], str]] = {
    "missing": (lambda name: lambda t: t.update(other=t.pop(name)), "is missing"),
    "extra": (lambda _: lambda t: t.update(zzz=torch.zeros(2)), "'zzz' belongs to nothing"),
    "shape": (lambda name: replace(name, lambda t: torch.cat([t, t])), "has shape"),
    "nan": (lambda name: replace(name, with_nan), "holds NaN or infinite values"),
    "dtype": (lambda name: replace(name, lambda t: t.to(torch.int32)), "has dtype I32"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_tensors_are_refused_by_name(
    kind: str, edit: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    class_name, values, tensor = KINDS[kind]
    if "num_virtual_tokens" not in values and kind != "tokens":
        values = {"target_modules": ["q_proj"], **values}
    config = make(tmp_path, model, make_config(class_name, **values))
    change, text = EDITS[edit]
    edit_tensors(tmp_path, change(tensor))
    error = refused(model, tmp_path, config, InvalidAdapter)
    assert text in error.message
    assert error.field == ("zzz" if edit == "extra" else tensor)


def test_sizes_that_the_file_does_not_have_take_no_memory(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[bool] = []
    wrap = PeftModel.__init__

    def noted(self: PeftModel, *args: Any, **more: Any) -> None:
        wrap(self, *args, **more)
        own = (one for name, one in self.named_parameters() if "hada_" in name)
        built.append(any(not one.is_meta for one in own))

    config = make(tmp_path, model, make_config("LoHaConfig", target_modules=["q_proj"], r=2))
    monkeypatch.setattr(PeftModel, "__init__", noted)
    error = refused(model, tmp_path, config | {"r": 4096}, InvalidAdapter)
    assert "hada_w1_a" in error.message
    assert built == [False]


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), 2.0**24])
def test_positions_must_be_whole_numbers(
    value: float, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = make(tmp_path, model, make_config("ShiraConfig", r=2, target_modules=["q_proj"]))
    edit_tensors(tmp_path, replace(f"{Q}shira_indices", lambda t: t + value))
    assert "shira_indices' holds positions that are not whole numbers" in str(
        refused(model, tmp_path, config, InvalidAdapter)
    )


def test_positions_are_not_half_precision(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("ShiraConfig", r=2, target_modules=["q_proj"]))
    edit_tensors(tmp_path, replace(f"{Q}shira_indices", lambda t: t.half()))
    assert "shira_indices' has dtype F16; I32, I64, F32 are read" in str(
        refused(model, tmp_path, config, InvalidAdapter)
    )


def test_positions_must_lie_in_the_weight(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("ShiraConfig", r=2, target_modules=["q_proj"]))
    edit_tensors(tmp_path, replace(f"{Q}shira_indices", lambda t: t + 1000))
    assert "lie outside its weight of shape [64, 64]" in str(
        refused(model, tmp_path, config, InvalidAdapter)
    )


def test_a_pickle_is_never_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("LoHaConfig", target_modules=["q_proj"]))
    os.rename(tmp_path / WEIGHTS, tmp_path / "adapter_model.bin")
    assert "adapter_model.safetensors is missing" in str(
        refused(model, tmp_path, config, InvalidAdapter)
    )


def test_a_cut_file_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("LoHaConfig", target_modules=["q_proj"]))
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-8])
    assert "is not a whole safetensors file" in str(
        refused(model, tmp_path, config, InvalidAdapter)
    )


def test_an_overflowing_delta_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("LoHaConfig", target_modules=["q_proj"]))
    edit_tensors(tmp_path, replace(f"{Q}hada_w1_a", lambda t: t * 1e30))
    edit_tensors(tmp_path, replace(f"{Q}hada_w2_a", lambda t: t * 1e30))
    assert "'model.layers.0.self_attn.q_proj' holds NaN or infinite values" in str(
        refused(model, tmp_path, config, InvalidAdapter)
    )


CHANGED: list[tuple[str, dict[str, Any], dict[str, Any], type[AdapterError], str]] = [
    ("BOFTConfig", {}, {"boft_n_butterfly_factor": 2}, UnsupportedAdapter, "CUDA extension"),
    ("BOFTConfig", {}, {"boft_block_size": 0}, InvalidAdapter, "must be 0"),
    ("BOFTConfig", {}, {"boft_block_size": 48}, IncompatibleAdapter, "do not divide into blocks"),
    ("C3AConfig", {"block_size": 16}, {"block_size": 48}, InvalidAdapter, "PEFT cannot build"),
    ("WaveFTConfig", {"n_frequency": 9}, {"wavelet_family": "x9"}, InvalidAdapter, "PEFT cannot"),
    ("LoHaConfig", {}, {"r": 4}, InvalidAdapter, "has shape [64, 8]"),
    ("LoHaConfig", {}, {"target_modules": ["wq"]}, IncompatibleAdapter, "matches no module"),
    ("LoHaConfig", {}, {"target_modules": "(a+)+"}, IncompatibleAdapter, "matches no module"),
    (
        "VBLoRAConfig",
        {"vector_length": 16, "num_vectors": 20},
        {"num_vectors": 1 << 30},
        InvalidAdapter,
        "values in all tensors; the file has",
    ),
]


@pytest.mark.parametrize(("name", "values", "changes", "error", "text"), CHANGED)
def test_a_config_that_is_not_of_these_tensors(
    name: str,
    values: dict[str, Any],
    changes: dict[str, Any],
    error: type[AdapterError],
    text: str,
    model: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    config = make(tmp_path, model, make_config(name, target_modules=["q_proj"], **values))
    assert text in refused(model, tmp_path, config | changes, error).message


PROMPTS: list[tuple[str, dict[str, Any], type[AdapterError], str]] = [
    ("PromptTuningConfig", {"token_dim": 32}, IncompatibleAdapter, "token_dim = 32, but the base"),
    ("PromptTuningConfig", {"num_virtual_tokens": 4}, InvalidAdapter, "need [4, 64]"),
    ("PrefixTuningConfig", {"num_layers": 3}, IncompatibleAdapter, "the base model has 2 layers"),
    ("PrefixTuningConfig", {"token_dim": 33}, InvalidAdapter, "must be a multiple"),
    ("PrefixTuningConfig", {"token_dim": 64}, IncompatibleAdapter, "makes keys of 2 x 16 values"),
    (
        "PrefixTuningConfig",
        {"num_attention_heads": 4},
        IncompatibleAdapter,
        "num_attention_heads = 4, but the base model has 2 heads of keys",
    ),
    ("PrefixTuningConfig", {"num_attention_heads": None}, InvalidAdapter, "must be a multiple"),
]


@pytest.mark.parametrize(("name", "changes", "error", "text"), PROMPTS)
def test_prompts_of_another_base(
    name: str,
    changes: dict[str, Any],
    error: type[AdapterError],
    text: str,
    model: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    config = make(tmp_path, model, make_config(name, num_virtual_tokens=3))
    assert text in refused(model, tmp_path, config | changes, error).message


def test_prefixes_need_keys_and_values_of_one_size(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("PrefixTuningConfig", num_virtual_tokens=3))
    seen = geometry_of(model)
    one, other = seen.layers[0], dataclasses.replace(seen.layers[0], key_dim=8)
    for layers in ((), (one, other), (other, other)):
        geometry = dataclasses.replace(seen, layers=layers)
        error = refused(model, tmp_path, config, UnsupportedAdapter, geometry)
        assert "has no keys and values of one size in all layers" in error.message


def test_a_prompt_of_another_width(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("PromptTuningConfig", num_virtual_tokens=3))
    edit_tensors(tmp_path, replace("prompt_embeddings", lambda t: t[:, :32].contiguous()))
    error = refused(model, tmp_path, config | {"token_dim": None}, IncompatibleAdapter)
    assert "the base model's embeddings have 64 values" in error.message


def test_norms_alone_are_replaced(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("LNTuningConfig", target_modules=["norm"]))
    error = refused(model, tmp_path, config | {"target_modules": ["q_proj"]}, UnsupportedAdapter)
    assert "(Linear), which is no norm" in error.message
    error = refused(model, tmp_path, config | {"target_modules": ".*_proj"}, UnsupportedAdapter)
    assert "(Linear), which is no norm" in error.message
    error = refused(model, tmp_path, config | {"target_modules": "norm"}, IncompatibleAdapter)
    assert "target_modules 'norm' matches no module of 'org/tiny'" in error.message
    error = refused(model, tmp_path, config | {"target_modules": ["ln"]}, IncompatibleAdapter)
    assert "matches no module of 'org/tiny'" in error.message
    unseen = BaseGeometry.of(model, model_id="org/tiny")
    error = refused(model, tmp_path, config, UnsupportedAdapter, unseen)
    assert "'model.norm' (LlamaRMSNorm), which was not seen to work on each" in error.message


def test_tokens_of_another_base(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("TrainableTokensConfig", token_indices=[3, 4]))
    error = refused(model, tmp_path, config | {"token_indices": [3, 300]}, IncompatibleAdapter)
    assert "token 300; the base model has 300 tokens" in error.message
    error = refused(model, tmp_path, config | {"target_modules": ["lm_head"]}, UnsupportedAdapter)
    assert "matches lm_head; trained tokens are served in the token embedding" in error.message
    tied = tiny_llama(tie_word_embeddings=True)
    error = refused(tied, tmp_path, config, InvalidAdapter)
    assert "'base_model.model.lm_head.trainable_tokens_delta', which is missing" in error.message


def test_tied_tokens_must_agree(tmp_path: Path) -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    config = make(tmp_path, tied, make_config("TrainableTokensConfig", token_indices=[3, 4]))
    edit_tensors(
        tmp_path, replace("base_model.model.lm_head.trainable_tokens_delta", lambda t: t + 1)
    )
    assert "differ, but the base model ties" in str(refused(tied, tmp_path, config, InvalidAdapter))


def test_conv1d_takes_only_kinds_that_are_the_same_on_it(tmp_path: Path) -> None:
    model = TINY_MODELS["gpt2"]()
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "n_frequency": 9}
    config = make(tmp_path, model, make_config("FourierFTConfig", **settings))
    error = refused(model, tmp_path, config, UnsupportedAdapter)
    assert "(Conv1D), which" in error.message


def test_modules_that_are_no_linear_layer(model: LlamaForCausalLM, tmp_path: Path) -> None:
    config = make(tmp_path, model, make_config("LoHaConfig", target_modules=["q_proj"]))
    changes = {"target_modules": ["embed_tokens"]}
    error = refused(model, tmp_path, config | changes, UnsupportedAdapter)
    assert "'model.embed_tokens' (Embedding), which" in error.message
