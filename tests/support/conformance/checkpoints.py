"""Checkpoints of every kind, made and read by PEFT itself."""

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import PreTrainedModel

from tests.support.adapters import edit_config
from tests.support.conformance.architectures import Layout
from tests.support.conformance.kinds import Kind

# How far trained parameters are moved from where PEFT starts them, by a part
# of their name; the first that matches counts.
_SPREADS = {
    "lora_embedding_A": 0.03,
    "lora_A": 0.1,
    "lora_B": 0.3,
    "lora_magnitude_vector": 0.2,
    "ia3_l": 0.3,
    "vera_lambda_b": 0.5,
    "prompt_encoder": 0.2,
    "spectrum": 3.0,
    "randlora": 0.01,  # its default scaling is a hundred times a LoRA's
}
_DEFAULT_SPREAD = 0.1
# What PEFT is seen to raise on architectures that a kind was not made for.
_REFUSALS = (
    AttributeError,
    ImportError,
    IndexError,
    RuntimeError,
    TypeError,
    ValueError,
)


CausalLM = PreTrainedModel | PeftModel


class NotInPeft(Exception):
    """PEFT itself does not make, or does not load, this kind on this architecture."""


@contextlib.contextmanager
def in_peft() -> Iterator[None]:
    """Code of PEFT's: quiet, with its own random stream, its refusals as `NotInPeft`."""
    # BOFT leaves other compilers behind in the environment.
    environment = mock.patch.dict(os.environ)
    with environment, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            yield
        except _REFUSALS as error:
            raise NotInPeft(f"{type(error).__name__}: {error}") from error


def save_checkpoint(
    folder: Path, kind: Kind, layout: Layout, base: PreTrainedModel, *, size: int
) -> None:
    """Let PEFT make an adapter of `base` and save it; its trained parameters are random.

    `base` is left as it was. Raises NotInPeft.
    """
    with in_peft():
        model = get_peft_model(copy.deepcopy(base), kind.recipe(layout, size))
        if kind.fitted:
            _fit(model)
        options: dict[str, Any] = {}
        if kind.converted:
            options["path_initial_model_for_weight_conversion"] = str(_initial(folder, model))
        _train(model, seed=size)
        _save(model, folder, safe_serialization=not kind.pickled, **options)
    edit_config(folder, base_model_name_or_path=None, **_sorted_sets(folder), **kind.edits)


def load_oracle(folder: Path, base: PreTrainedModel) -> PeftModel:
    """PEFT's own model with the adapter. `base` is left as it was. Raises NotInPeft."""
    with in_peft():
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@torch.inference_mode()
def reference_logits(model: CausalLM, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), vocab] in one forward pass, virtual tokens left out. Raises NotInPeft."""
    with in_peft():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[-len(ids) :].float()


def _sorted_sets(folder: Path) -> dict[str, list[str]]:
    """Keys that PEFT holds as sets, which it writes in another order each time."""
    config = json.loads((folder / "adapter_config.json").read_text())
    keys = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules")
    return {key: sorted(config[key]) for key in keys if isinstance(config.get(key), list)}


def _initial(folder: Path, model: PeftModel) -> Path:
    """Save what a conversion needs to know of the initialisation, as PEFT's guide shows."""
    path = folder.with_name(f"{folder.name}-initial")
    config: Any = model.peft_config["default"]
    initialisation, config.init_lora_weights = config.init_lora_weights, True
    _save(model, path)
    config.init_lora_weights = initialisation
    return path


def _save(model: PeftModel, folder: Path, **options: Any) -> None:
    # Where a base is named, saving looks it up on the Hub.
    model.peft_config["default"].base_model_name_or_path = None
    # The card beside an adapter takes longer than all the rest, and nobody reads it here.
    with mock.patch.object(PeftModel, "create_or_update_model_card"):
        model.save_pretrained(str(folder), **options)


def _fit(model: PeftModel) -> None:
    ids = torch.randint(3, 300, (8, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)


@torch.no_grad()
def _train(model: PeftModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = next((s for part, s in _SPREADS.items() if part in name), _DEFAULT_SPREAD)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
