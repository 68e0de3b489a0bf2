"""What an adapter must fit: the shapes of the base model's layers and parameters."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of one linear layer, `y = W x` with W of shape [out_features, in_features].

    `transposed`: the model stores its weight as [in_features, out_features]
    (transformers' `Conv1D`). Terms are in the orientation of W all the same.
    """

    in_features: int
    out_features: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingShape:
    """Sizes of a token embedding, a table of shape [num_tokens, dim]."""

    num_tokens: int
    dim: int


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """Sizes of one layer's keys and values, as observed in the start-up probe."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        """Keys and values of one token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class RowAxes:
    """Along which axis a module has a row for each token of a batch.

    One axis for each of its outputs; for each argument, by position or name, one, or None
    where it is no tensor of rows.
    """

    outputs: tuple[int, ...]
    args: tuple[int | None, ...] = ()
    kwargs: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseGeometry:
    """A base model as adapters see it. All paths are below the causal LM.

    `model_id` is the name adapters declare in `base_model_name_or_path`.
    `linears` maps the path of every linear layer but the output head (for
    example `model.layers.0.self_attn.q_proj`) to its shape; `heads` is the
    output head and `embeddings` the token embedding, one entry each where the
    model has them. `tied`: the two share their weight. `modules` maps every
    module path to its class name and `parameters` every parameter to its shape,
    so that what exists but cannot be served is refused by name.
    `transposed_experts` are the modules whose experts are stored as [in, out].
    `embedding_dtype` is what the token embedding computes in.
    `rows` is what a trial run showed of the modules that work row by row, by path, and
    `layers` what it showed of each layer's attention; empty without one.
    """

    model_id: str
    model_type: str
    num_layers: int
    linears: Mapping[str, LinearShape]
    modules: Mapping[str, str]
    heads: Mapping[str, LinearShape] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingShape] = field(default_factory=dict)
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    transposed_experts: frozenset[str] = frozenset()
    tied: bool = False
    embedding_dtype: "torch.dtype | None" = None
    rows: Mapping[str, RowAxes] = field(default_factory=dict)
    layers: tuple[LayerGeometry, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and all linear shapes, as a hex string."""
        shapes = {path: [s.in_features, s.out_features] for path, s in self.linears.items()}
        text = json.dumps([self.model_type, self.num_layers, shapes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def linear(self, path: str) -> LinearShape | None:
        """The shape of a linear layer or of the output head; None if `path` is neither."""
        return self.linears.get(path) or self.heads.get(path)

    @classmethod
    def of(cls, model: "torch.nn.Module", *, model_id: str) -> "BaseGeometry":
        """Read the geometry off a transformers causal LM (before any layer is wrapped)."""
        from dynamic_lora_adapters.apply.widening import class_name, dtype_of

        head = model.get_output_embeddings()  # type: ignore[operator]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        linears: dict[str, LinearShape] = {}
        heads: dict[str, LinearShape] = {}
        for path, module in model.named_modules():
            shape = _linear_shape(module)
            if shape is not None:
                (heads if module is head else linears)[path] = shape
        config = model.config
        return cls(
            model_id=model_id,
            model_type=str(config.model_type),  # type: ignore[union-attr]
            num_layers=int(config.num_hidden_layers),  # type: ignore[union-attr, arg-type]
            linears=linears,
            modules={path: class_name(m) for path, m in model.named_modules() if path},
            heads=heads,
            embeddings=_embedding_shape(model, embedding),
            parameters={
                name: tuple(parameter.shape)
                for name, parameter in model.named_parameters(remove_duplicate=False)
            },
            transposed_experts=frozenset(
                path for path, m in model.named_modules() if getattr(m, "is_transposed", False)
            ),
            tied=head is not None and head.weight is embedding.weight,
            embedding_dtype=dtype_of(embedding),
        )


def _linear_shape(module: "torch.nn.Module") -> LinearShape | None:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return LinearShape(module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return LinearShape(in_features, out_features, transposed=True)
    return None


def _embedding_shape(
    model: "torch.nn.Module", embedding: "torch.nn.Module"
) -> dict[str, EmbeddingShape]:
    import torch

    if not isinstance(embedding, torch.nn.Embedding):
        return {}
    shape = EmbeddingShape(embedding.num_embeddings, embedding.embedding_dim)
    return {path: shape for path, module in model.named_modules() if module is embedding}
