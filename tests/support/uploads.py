"""A small adapter on disk and ways to spoil a copy of it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model.model.layers.0.self_attn."
Q_A, Q_B = f"{KEY_PREFIX}q_proj.lora_A.weight", f"{KEY_PREFIX}q_proj.lora_B.weight"


def copy_adapter(source: Path, target: Path) -> Path:
    """Copy PEFT's files of an adapter into a new or an empty folder."""
    target.mkdir(exist_ok=True, parents=True)
    for name in ("adapter_config.json", WEIGHTS_FILE, "task.json"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return target


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the folder's tensors: it edits the dict in place or returns another."""
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    changed = change(tensors)
    save_file(dict(changed if isinstance(changed, Mapping) else tensors), path)
