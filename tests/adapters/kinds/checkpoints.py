"""Checkpoints of every kind, made by PEFT itself with random values that matter."""

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings, and without its attempt to compile BOFT's extension."""
    with (
        warnings.catch_warnings(),
        mock.patch("peft.tuners.boft.layer._FBD_CUDA", new=False),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def make(
    folder: Path, model: PreTrainedModel, config: PeftConfig, *, spread: float = 0.2
) -> dict[str, Any]:
    """Save an adapter of `model` in `folder`, every trained value moved; its config's content."""
    generator = torch.Generator().manual_seed(1)
    with quiet():
        wrapped = get_peft_model(copy.deepcopy(model), config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise * spread)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's `adapter_config.json`."""
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Let `edit` change the tensors of the folder's file."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def peft_logits(model: PreTrainedModel, folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocab] as PEFT computes them with the adapter in `folder`: the oracle."""
    with quiet(), torch.no_grad():
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
        output: torch.Tensor = wrapped(input_ids=input_ids[None]).logits[0]
    # PEFT leaves virtual tokens in.
    return output[-len(input_ids) :]


def make_config(name: str, **values: Any) -> PeftConfig:
    """A config of the PEFT class `name` for a causal LM."""
    with quiet():
        config: PeftConfig = getattr(peft, name)(task_type="CAUSAL_LM", **values)
    return config
