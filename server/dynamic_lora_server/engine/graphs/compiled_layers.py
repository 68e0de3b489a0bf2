"""Decoder layers compiled by torch, for steps of fixed shape.

`torch.compile` fuses what lies between projections and attention, norms, rotary
embedding, activations and residual sums, from dozens of small launches into a few. The
projections with their deltas and the attention over pages stay as they are. All layers
share one code for a single row and one for more rows, once they have been run with one
row, with some, and with another number.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dynamic_lora_server.errors import UnsupportedModel

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


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
        _keep_results()
        # Of all sizes, torch takes that for dynamic which it sees change: the rows.
        self._forwards: list[Callable[..., Any]] = [
            torch.compile(layer.forward) for layer in self._layers
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


def _keep_results() -> None:
    """Have torch keep compiled code where whatever else outlives a start is kept.

    Its own default is a folder for temporary files; it puts that into the environment when
    it is imported. What somebody else has put there stays.
    """
    given = os.environ.get(_CACHE_VARIABLE)
    by_default = Path(tempfile.gettempdir()) / "torchinductor_"
    if given is None or given.startswith(str(by_default)):
        os.environ[_CACHE_VARIABLE] = str(user_cache_path("dynamic-lora") / "torch")
