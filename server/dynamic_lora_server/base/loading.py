"""The base model and its tokenizer, from files to a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynamic_lora_server.base.base_model import BaseModel, BaseModelUnavailable
from dynamic_lora_server.base.dtypes import choose_dtype
from dynamic_lora_server.config import ServerConfig


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
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    torch.nn.Module.to(model, device)
    torch.nn.Module.eval(model)
    return model, tokenizer


@contextmanager
def _unusable(base: BaseModel) -> Iterator[None]:
    """What transformers says of the base's files, with their name before it."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelUnavailable(
            f"{base.name} cannot be loaded: {error}",
            fix="A base model is a folder, or a model of the Hub, that has a config.json, weights "
            "and a tokenizer.",
        ) from error


def num_embeddings(model: PreTrainedModel) -> int:
    """Token ids that the model has a row for, in its embedding and in its head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(next(table.parameters())) for table in tables if table is not None)
