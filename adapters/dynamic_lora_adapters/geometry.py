"""What an adapter must fit: the shapes of the base model's linear layers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of one linear layer, `y = W x` with W of shape [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseGeometry:
    """A base model as adapters see it.

    `model_id` is the name adapters declare in `base_model_name_or_path`.
    `linears` maps the module path below the causal LM (for example
    `model.layers.0.self_attn.q_proj`) to its shape, for every layer that can
    take a delta; `modules` maps every module path to its class name, so that a
    target that exists but cannot be served is refused by name.
    """

    model_id: str
    model_type: str
    num_layers: int
    linears: Mapping[str, LinearShape]
    modules: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and all linear shapes, as a hex string."""
        shapes = {path: [s.in_features, s.out_features] for path, s in self.linears.items()}
        text = json.dumps([self.model_type, self.num_layers, shapes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def of(cls, model: "torch.nn.Module", *, model_id: str) -> "BaseGeometry":
        """Read the geometry off a transformers causal LM (before any layer is wrapped).

        The output head is left out of `linears`: its weight may be tied to the
        input embedding, and a delta on it is not served.
        """
        import torch

        head = model.get_output_embeddings()  # type: ignore[operator]
        linears = {
            path: LinearShape(module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        config = model.config
        return cls(
            model_id=model_id,
            model_type=str(config.model_type),  # type: ignore[union-attr]
            num_layers=int(config.num_hidden_layers),  # type: ignore[union-attr, arg-type]
            linears=linears,
            modules={path: type(m).__name__ for path, m in model.named_modules() if path},
        )
