"""LoRA checkpoints made by PEFT itself, with random factors large enough to matter."""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that is meant here, and warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(
    directory: Path,
    model: PreTrainedModel,
    *,
    rank: int = 4,
    alpha: int = 8,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    use_rslora: bool = False,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    base_model: str | None = None,
    magnitude: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a LoRA of `model` in PEFT's format under `directory` and return it.

    `targets` takes what PEFT takes: leaf names, a regular expression or
    "all-linear". `magnitude` is the spread of B's entries; at the default a
    tiny model's logits clearly move. `base_model` goes into
    `base_model_name_or_path`. `model` is left as it was.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=None if layers_to_transform is None else list(layers_to_transform),
        exclude_modules=(
            exclude_modules
            if exclude_modules is None or isinstance(exclude_modules, str)
            else list(exclude_modules)
        ),
    )
    save_adapter(directory, model, config, seed=seed, magnitude=magnitude, dtype=dtype)
    edit_config(directory, base_model_name_or_path=base_model)
    return directory


def save_adapter(
    directory: Path,
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    seed: int = 0,
    magnitude: float = 0.3,
    dtype: torch.dtype | None = None,
    save_embedding_layers: bool = False,
) -> Path:
    """Save an adapter as `config` describes it, everything trainable at random, and return it.

    The base's own parameters that the config trains are moved a little.
    `magnitude` is as in `make_adapter`; `dtype` is that of the factors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), quiet():
        peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_A" in name:
            noise *= parameter.shape[1] ** -0.5
        elif "lora_B" in name or "lora_embedding" in name:
            noise *= magnitude
        else:
            noise = parameter.data + noise * 0.2
        # In place: PEFT ties some of them.
        parameter.data.copy_(noise)
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)
    # The base's name is left out: PEFT would look it up on the Hub.
    with quiet():
        peft_model.save_pretrained(str(directory), save_embedding_layers=save_embedding_layers)
    edit_config(directory, base_model_name_or_path=None)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Overwrite keys of the folder's `adapter_config.json`."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes, indent=2))


def load_with_peft(model: PreTrainedModel, adapters: Mapping[str, Path]) -> PeftModel:
    """PEFT's own model with every one of `adapters` (name to folder) loaded: the oracle.

    Works on a copy of `model`. Select one with `.set_adapter(name)`; the base
    alone is under `with .disable_adapter():`.
    """
    (first, folder), *others = adapters.items()
    with quiet():
        peft_model = PeftModel.from_pretrained(copy.deepcopy(model), str(folder), first)
        for name, folder in others:
            peft_model.load_adapter(str(folder), name)
    return peft_model.eval()
