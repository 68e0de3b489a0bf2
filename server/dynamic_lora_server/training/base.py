"""The base that an adapter is trained on: what of a recipe it cannot take, and its loading."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynamic_lora_adapters.near_names import near_names
from dynamic_lora_server.base.loading import UNUSABLE, pick_device, read_model
from dynamic_lora_server.config import DEVICES
from dynamic_lora_server.training.config import LoraSettings, TrainingConfig
from dynamic_lora_server.training.errors import TrainingConfigError, TrainingError
from dynamic_lora_server.training.trainer import attach_lora


def check_base(base: Path, config: TrainingConfig) -> None:
    """Find out from a base's `config.json` whether it can take the recipe, reading no weights.

    Raises TrainingConfigError naming the field of the recipe at fault, TrainingError for a
    folder that is no base model or a quantised one.
    """
    with _unusable(base):
        settings = AutoConfig.from_pretrained(base)
    _check_plain(base, settings)
    _check_positions(settings, config)
    with _unusable(base), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    _check_targets(model, config.lora)
    try:
        attach_lora(model, config.lora)
    except ValueError as error:
        raise TrainingConfigError(f"lora.target_modules: {error}") from error


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which has an end-of-sequence token. Raises TrainingError."""
    with _unusable(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"the tokenizer in {base} has no end-of-sequence token to end answers")
    return tokenizer


def load_model(base: Path, device: torch.device) -> PreTrainedModel:
    """The base in float32 on `device`. Raises TrainingError, also where weights are missing."""
    with _unusable(base):
        model = read_model(base, torch.float32)
    torch.nn.Module.to(model, device)
    return model


def training_device(wanted: str) -> torch.device:
    """The device that an option names; "auto" is a GPU where there is one.

    Raises TrainingConfigError for a GPU where there is none, and for an unknown name.
    """
    if wanted not in DEVICES:
        raise TrainingConfigError(f"the device {wanted} is none of {', '.join(DEVICES)}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingConfigError("the device cuda cannot be used: torch sees no NVIDIA GPU here")
    return pick_device(wanted)


@contextmanager
def _unusable(base: Path) -> Iterator[None]:
    try:
        yield
    except UNUSABLE as error:
        raise TrainingError(f"the base model in {base} cannot be loaded: {error}") from error


def _check_plain(base: Path, settings: PreTrainedConfig) -> None:
    quantization = getattr(settings, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "quantised")
        raise TrainingError(
            f"the base model in {base} is quantised ({method}); train on the model that it was "
            f"made from"
        )


def _check_positions(settings: PreTrainedConfig, config: TrainingConfig) -> None:
    text = settings.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise TrainingConfigError(
            f"max_length is {config.max_length}, but the base takes {positions} tokens"
        )
    window = getattr(text, "sliding_window", None)
    if config.share_prompts and window is not None and window < config.max_length:
        raise TrainingConfigError(
            f"share_prompts needs max_length within the model's attention window: "
            f"max_length is {config.max_length}, the window {window}"
        )


def _check_targets(model: PreTrainedModel, lora: LoraSettings) -> None:
    """PEFT refuses a list of which nothing matches; a single name in vain it passes over."""
    if isinstance(lora.target_modules, str):
        return
    names = [name for name, _ in model.named_modules() if name]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = near_names(target, {name.rpartition(".")[2] for name in names})
            meant = f"; like it are {', '.join(near)}" if near else ""
            raise TrainingConfigError(
                f"lora.target_modules: the base has no module {target!r}{meant}"
            )
