"""Decoder layers compiled by torch, for steps of fixed shape.

`torch.compile` fuses what lies between projections and attention, norms, rotary
embedding, activations and residual sums, from dozens of small launches into a few. The
projections with their deltas and the attention over pages stay as they are. All layers
share one compiled code for any number of rows, and a second one for a single row.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dynamic_lora_server.errors import UnsupportedModel


class CompiledLayers:
    """Compiled in the place of a model's own decoder layers, while `in_place`.

    They are compiled when they first run, and kept in the user's cache folder. Raises
    UnsupportedModel if there is no decoder layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers: list[nn.Module] = [
            module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
        ]
        if not self._layers:
            raise UnsupportedModel(f"{type(model).__name__} has no decoder layers to compile.")
        # Where whatever else is kept between starts is kept too.
        cache = user_cache_path("dynamic-lora") / "torch"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
        self._forwards: list[Callable[..., Any]] = [
            torch.compile(layer.forward, dynamic=True) for layer in self._layers
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model run them.

        Where torch would give compiling up and run a layer as it is, it raises.
        """
        from torch._dynamo import config

        with config.patch(fail_on_recompile_limit_hit=True):
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward
            try:
                yield
            finally:
                for layer in self._layers:
                    del layer.forward
