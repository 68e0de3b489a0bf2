from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynamic_lora_adapters import IncompatibleAdapter, InvalidAdapter
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE
from dynamic_lora_adapters.lora.checkpoint import Checkpoint, Part

PARAMETERS = ["layer.weight", "layer.bias", "norm.weight"]
NAMES: dict[str, tuple[str, Part]] = {
    "layer.lora_A.weight": ("layer", Part.A),
    "layer.lora_A.default.weight": ("layer", Part.A),
    "layer.base_layer.lora_B.weight": ("layer.base_layer", Part.B),
    "layer.lora_B.bias": ("layer", Part.B_BIAS),
    "layer.lora_B.default.bias": ("layer", Part.B_BIAS),
    "layer.lora_magnitude_vector": ("layer", Part.MAGNITUDE),
    "layer.lora_magnitude_vector.default.weight": ("layer", Part.MAGNITUDE),
    "embed.lora_embedding_A": ("embed", Part.EMBEDDING_A),
    "embed.lora_embedding_B.default": ("embed", Part.EMBEDDING_B),
    "embed.token_adapter.trainable_tokens_delta": ("embed", Part.TOKENS),
    "layer.base_layer.weight": ("layer.weight", Part.PARAMETER),
    "norm.weight": ("norm.weight", Part.PARAMETER),
    "layer.lora_velora_embed": ("layer", Part.VELORA),
    "norm.original_module.weight": ("norm.weight", Part.ORIGINAL),
    "norm.token_adapter.base_layer.weight": ("norm.weight", Part.ORIGINAL),
    "norm.modules_to_save.weight": ("norm.weight", Part.REPEATED),
    "norm.modules_to_save.default.weight": ("norm.weight", Part.REPEATED),
}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path = folder / WEIGHTS_FILE
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, path)
    return Checkpoint(path, PARAMETERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_is_understood(name: str, tmp_path: Path) -> None:
    path, part = NAMES[name]
    opened = checkpoint(tmp_path, {name: torch.arange(6.0).reshape(2, 3).half()})
    assert opened.has(path, part)
    assert not opened.has("other", part)
    assert opened.name(path, part) == f"base_model.model.{name}"
    value = opened.take(path, part, (2, 3), factor=2.0)
    opened.finish()
    assert value.dtype == torch.float32
    assert value.tolist() == [[0, 2, 4], [6, 8, 10]]


@pytest.mark.parametrize(
    "name", ["layer.lora_C.weight", "other.weight", "other.modules_to_save.weight"]
)
def test_unknown_names_are_refused_on_opening(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=f"{name}' is no LoRA factor"):
        checkpoint(tmp_path, {name: torch.ones(1)})


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    both = {"layer.weight": torch.ones(1), "layer.base_layer.weight": torch.ones(1)}
    with pytest.raises(InvalidAdapter, match="are the same factor"):
        checkpoint(tmp_path, both)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer.lora_A.weight", "a module that target_modules does not match"),
        ("layer.lora_B.bias", "a LoRA bias, which the config's lora_bias does not ask for"),
        ("layer.lora_magnitude_vector", "a DoRA magnitude, which the config's use_dora does not"),
        ("embed.token_adapter.trainable_tokens_delta", "trainable_token_indices does not ask"),
        ("norm.weight", "replaces 'norm.weight' of the base model, which neither"),
        ("layer.lora_velora_embed", "which the config's velora_config does not ask for"),
        ("norm.original_module.weight", "a copy of 'norm.weight', whose module neither"),
        ("norm.modules_to_save.weight", "a copy of 'norm.weight', whose module neither"),
    ],
)
def test_what_nobody_took_is_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {name: torch.ones(1)})
    with pytest.raises(InvalidAdapter, match=message) as caught:
        opened.finish()
    assert caught.value.field == f"base_model.model.{name}"


def test_what_is_left_is_what_nobody_took(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.ones(1), "layer.bias": torch.ones(1)}
    tensors["layer.lora_A.weight"] = torch.ones(1)
    opened = checkpoint(tmp_path, tensors)
    assert opened.left(Part.PARAMETER) == ["layer.bias", "norm.weight"]
    opened.take("norm.weight", Part.PARAMETER, (1,))
    assert opened.left(Part.PARAMETER) == ["layer.bias"]


def test_what_is_skipped_may_be_anything(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"layer.lora_velora_embed": torch.tensor([torch.nan])})
    opened.skip("layer", Part.VELORA)
    opened.skip("other", Part.VELORA)
    opened.finish()


def test_shapes_tell_another_rank_from_another_base(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"layer.lora_A.weight": torch.ones(4, 8)})
    with pytest.raises(InvalidAdapter, match="the config gives this module rank 2"):
        opened.take("layer", Part.A, (2, 8), rank_axis=0)
    with pytest.raises(IncompatibleAdapter, match="the base model's 'layer' has another shape"):
        opened.take("layer", Part.A, (4, 9), rank_axis=0)
    with pytest.raises(IncompatibleAdapter, match="has another shape"):
        opened.take("layer", Part.A, (2, 8))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"norm.weight": torch.ones(1)})
    with pytest.raises(InvalidAdapter, match=r"'base_model.model.layer.lora_B.bias' is miss"):
        opened.take("layer", Part.B_BIAS, (1,))
    with pytest.raises(InvalidAdapter, match=r"'base_model.model.layer.weight' is missing"):
        opened.take("layer.weight", Part.PARAMETER, (1,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"norm.weight": torch.tensor([value])})
    message = "norm.weight' holds NaN or infinite values"
    with pytest.raises(InvalidAdapter, match=message):
        opened.take("norm.weight", Part.PARAMETER, (1,), factor=2.0)


def test_finite_values_whose_sum_is_not_are_taken(tmp_path: Path) -> None:
    value = torch.tensor([3e38, 3e38, -1.0])
    opened = checkpoint(tmp_path, {"norm.weight": value})
    assert torch.equal(opened.take("norm.weight", Part.PARAMETER, (3,)), value)


def test_infinities_that_cancel_are_refused(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"norm.weight": torch.tensor([torch.inf, -torch.inf])})
    with pytest.raises(InvalidAdapter, match="holds NaN or infinite values"):
        opened.take("norm.weight", Part.PARAMETER, (2,))
