"""A LoRA's terms beside what PEFT makes of the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from dynamic_lora_adapters import AdapterTerms, LoraSpec
from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.files.json_file import read_json_object
from dynamic_lora_adapters.lora.weights import read_with_notes
from tests.support.adapters import load_with_peft
from tests.support.apply_terms import logits
from tests.support.geometry import geometry_of

PROMPT = torch.tensor([5, 17, 250, 3, 42, 42, 7, 19, 101, 8])


def lora(**keys: Any) -> LoraConfig:
    """A LoRA of rank 4 and alpha 8 for a causal LM, unless `keys` say otherwise."""
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **keys})


def read(folder: Path, model: PreTrainedModel) -> AdapterTerms:
    """The terms of the adapter in `folder` on `model`."""
    return _read(folder, model)[0]


def notes_of(folder: Path, model: PreTrainedModel) -> list[str]:
    """What an uploader is told of the files in `folder`."""
    return _read(folder, model)[1]


def check_against_peft(folder: Path, model: PreTrainedModel) -> AdapterTerms:
    """The terms in `folder`, after comparing what they do to a prompt with what PEFT does."""
    terms = read(folder, model)
    peft_model = load_with_peft(model, {"default": folder})
    with torch.no_grad():
        expected = peft_model(input_ids=PROMPT[None]).logits[0]
        plain = model(input_ids=PROMPT[None]).logits[0]
    assert (expected - plain).abs().max() > 0.05, "the adapter does nothing that could be wrong"
    torch.testing.assert_close(logits(model, terms, PROMPT), expected, rtol=0, atol=1e-4)
    return terms


def refused(folder: Path, model: PreTrainedModel, error: type[Exception], message: str) -> None:
    """Reading `folder` raises exactly `error`, with a message that matches."""
    with pytest.raises(error, match=message) as caught:
        read(folder, model)
    assert caught.type is error


def _read(folder: Path, model: PreTrainedModel) -> tuple[AdapterTerms, list[str]]:
    spec = LoraSpec.parse(read_json_object(folder / "adapter_config.json"))
    return read_with_notes(folder, spec, geometry_of(model), ModelWeights(model))
