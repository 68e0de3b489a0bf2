"""The base model and its tokenizer, from files to a device."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from dynamic_lora_adapters.apply.widening import widen
from dynamic_lora_server.base.base_model import BaseModel, BaseModelUnavailable
from dynamic_lora_server.base.dtypes import choose_dtype
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.engine.decoder.llama_layers import widening_paths

_MOST_NAMED = 8
_SHORT = {"BF16": torch.bfloat16, "F16": torch.float16}
# Where transformers looks for weights, in its order: all in one file, or in several by an index.
_WEIGHTS = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))


class WrongWeights(ValueError):
    """A checkpoint lacks weights of its model, or has them in other shapes."""


# What transformers and its readers of files raise for a folder that they cannot use, and the above.
UNUSABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def pick_device(wanted: str) -> torch.device:
    """The device that an option names; "auto" is a GPU where there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def load_model(
    base: BaseModel, config: ServerConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the device and in evaluation mode, and its tokenizer.

    Raises BaseModelUnavailable, naming the base, for files that cannot be used.
    """
    with _unusable(base):
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        model_config = transformers.AutoConfig.from_pretrained(base.path)
    # Rounded weights are multiplied into sums of float32.
    wanted = config.dtype if config.quantize == "none" else "float32"
    dtype = choose_dtype(wanted, device, model_config, native=config.native)
    with _unusable(base):
        short = None if device.type != "cpu" or dtype != torch.float32 else short_dtype(base.path)
        model = None if short is None else _read_short(base.path, short)
        if model is None:
            model = read_model(base.path, dtype)
    torch.nn.Module.to(model, device)
    torch.nn.Module.eval(model)
    return model, tokenizer


def read_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, on the CPU, with all weights that it has by its config.

    Raises WrongWeights, naming them and the files that were to have them, and what else is
    `UNUSABLE`.
    """
    # Typed as the model alone, which it is without the report.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # its own error does not say which
    )
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    # transformers would make them up. What is tied to a weight that is there is not missing.
    if lacking := sorted(report["missing_keys"]):
        told = [f"{name} (expected in {_file(folder, name)})" for name in lacking[:_MOST_NAMED]]
        raise WrongWeights(f"it lacks weights: {_listed(told, lacking)}")
    if other := sorted(report["mismatched_keys"]):
        told = [
            f"{name} is {list(found)} in place of {list(wanted)} (in {_file(folder, name)})"
            for name, found, wanted in other[:_MOST_NAMED]
        ]
        raise WrongWeights(f"its weights have other shapes than its config: {_listed(told, other)}")
    return model


def _read_short(folder: Path, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model in float32, but its layers' weights where the files, in `dtype`, have them.

    None if not all of it would be what it is when it is read in float32.
    """
    model = read_model(folder, dtype)
    paths = widening_paths(model)
    if not paths:
        return None
    widen(model, paths, torch.float32)
    model.config.dtype = torch.float32
    return model


def short_dtype(folder: Path) -> torch.dtype | None:
    """The sixteen bits that every weight of a folder's safetensors files is in; None if not so."""
    found = set()
    for path in _safetensors(folder):
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            found |= {stream.get_slice(name).get_dtype() for name in names}
    return _SHORT.get(found.pop()) if len(found) == 1 else None


def _safetensors(folder: Path) -> Collection[Path]:
    """The files that transformers reads weights from; none where it reads others."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {folder / file for file in places.values()}
    return []


def _listed(told: list[str], of: Collection[object]) -> str:
    num_more = len(of) - len(told)
    return ", ".join(told) + (f", and {num_more} more" if num_more else "")


def _file(folder: Path, weight: str) -> str:
    """The file that has, or was to have, a weight; the index of several if that names none."""
    for single, index in _WEIGHTS:
        if (folder / single).is_file():
            return single
        if (folder / index).is_file():
            places = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            return str(places.get(weight, index))
    return SAFE_WEIGHTS_NAME


@contextmanager
def _unusable(base: BaseModel) -> Iterator[None]:
    """What transformers says of the base's files, with their name before it."""
    try:
        yield
    except UNUSABLE as error:
        raise BaseModelUnavailable(
            f"{base.name} cannot be loaded: {error}",
            fix="A base model is a folder, or a model of the Hub, that has a config.json, weights "
            "and a tokenizer.",
        ) from error


def num_embeddings(model: PreTrainedModel) -> int:
    """Token ids that the model has a row for, in its embedding and in its head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(next(table.parameters())) for table in tables if table is not None)
