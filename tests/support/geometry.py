"""The geometry of a model with what a trial run shows of it."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.row_axes import watching_rows
from dynamic_lora_adapters.geometry import BaseGeometry, LayerGeometry

# No size of a tiny model.
_NUM_TOKENS = 19


def geometry_of(model: PreTrainedModel, *, model_id: str = "org/tiny") -> BaseGeometry:
    """As an engine around `model` would have it; the model is left as it is."""
    with watching_rows(model) as rows, torch.no_grad():
        cache = model(input_ids=torch.arange(_NUM_TOKENS)[None], use_cache=True).past_key_values
    layers = tuple(
        LayerGeometry(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in cache.layers
    )
    return replace(BaseGeometry.of(model, model_id=model_id), rows=rows, layers=layers)
