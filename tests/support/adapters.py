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
def _quiet() -> Iterator[None]:
    # PEFT reads an attribute that transformers has deprecated, and warnings are errors here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
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
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), _quiet():
        peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name:
            spread = parameter.shape[1] ** -0.5
        elif "lora_B" in name:
            spread = magnitude
        else:
            continue
        noise = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data = noise.to(dtype)
    # False, and the base's name written afterwards: PEFT would look it up on the Hub.
    peft_model.save_pretrained(str(directory), save_embedding_layers=False)
    edit_config(directory, base_model_name_or_path=base_model)
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
    with _quiet():
        peft_model = PeftModel.from_pretrained(copy.deepcopy(model), str(folder), first)
        for name, folder in others:
            peft_model.load_adapter(str(folder), name)
    return peft_model.eval()
