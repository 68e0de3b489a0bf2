"""Bases that a recipe cannot be trained on, told before their weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_lora_server.training import TrainingConfig, TrainingConfigError, TrainingError
from dynamic_lora_server.training.base import (
    check_base,
    load_model,
    load_tokenizer,
    training_device,
)
from tests.server.training.test_config import recipe
from tests.support.models import TINY_MODELS, save_tiny_base, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny base without its weights, which no check reads."""
    folder = save_tiny_base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    return folder


def check(base: Path, **changes: Any) -> None:
    """Look at the base with a recipe's fields replaced."""
    check_base(base, TrainingConfig.model_validate(recipe(**changes)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_a_base_is_looked_at_without_its_weights(tmp_path: Path, family: str) -> None:
    TINY_MODELS[family]().config.save_pretrained(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": {"target_modules": ["q_prj", "v_proj"]}},
            r"lora\.target_modules: the base has no module 'q_prj'; like it are q_proj",
        ),
        ({"lora": {"target_modules": ["zzz"]}}, "the base has no module 'zzz'$"),
        ({"lora": {"target_modules": ["norm"]}}, r"lora\.target_modules: .* is not supported"),
        ({"max_length": 513}, "max_length is 513, but the base takes 512 tokens"),
    ],
)
def test_what_the_base_cannot_take_is_named(
    base: Path, changes: dict[str, Any], message: str
) -> None:
    check(base)
    with pytest.raises(TrainingConfigError, match=message):
        check(base, **changes)


def test_shared_prompts_need_the_attention_window(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", family="mistral")
    check(base)
    with pytest.raises(TrainingConfigError, match="max_length is 512, the window 32"):
        check(base, share_prompts=True)


def test_a_quantised_base_is_refused(base: Path) -> None:
    path = base / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"is quantised \(awq\); train on the model"):
        check(base)


def test_a_folder_that_lacks_something_is_named(base: Path) -> None:
    with pytest.raises(TrainingError, match=f"the base model in {base} cannot be loaded"):
        load_model(base, torch.device("cpu"))
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TrainingError, match=f"the base model in {base} cannot be loaded"):
        load_tokenizer(base)
    (base / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TrainingError, match=f"the base model in {base} cannot be loaded"):
        check(base)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"lacks weights: model\.norm\.weight"):
        load_model(base, torch.device("cpu"))


def test_answers_need_a_token_that_ends_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="has no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_devices() -> None:
    assert training_device("cpu") == torch.device("cpu")
    with pytest.raises(TrainingConfigError, match="the device tpu is none of auto, cpu, cuda"):
        training_device("tpu")
