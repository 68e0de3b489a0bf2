"""Modules whose weights stay in the sixteen bits of the checkpoint, and compute in float32."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


class WideningLinear(nn.Linear):
    """Takes the place of an `nn.Linear` whose weight has fewer bits than it computes in.

    Widening loses nothing: it computes what the widened weight would. Slow, for it widens at each
    call; `inject` puts faster products in its place.
    """

    def __init__(self, base: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.dtype = dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Output [..., out_features] in `dtype`."""
        return F.linear(input, self.weight.to(self.dtype), self.bias)


class WideningEmbedding(nn.Embedding):
    """The same for an `nn.Embedding`; no slower, for it widens the rows that are looked up."""

    def __init__(self, base: nn.Embedding, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = base.num_embeddings
        self.embedding_dim = base.embedding_dim
        self.padding_idx = base.padding_idx
        self.weight = base.weight
        self.dtype = dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] in `dtype`."""
        return F.embedding(input, self.weight).to(self.dtype)

    def extra_repr(self) -> str:
        """Its sizes, and what it computes in."""
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"


def dtype_of(layer: nn.Module) -> torch.dtype:
    """What a linear layer or an embedding computes in."""
    widens = isinstance(layer, WideningLinear | WideningEmbedding)
    dtype = layer.dtype if widens else layer.get_parameter("weight").dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def class_name(module: nn.Module) -> str:
    """What a module is called where users read of it: as what it stands for."""
    if isinstance(module, WideningLinear):
        return nn.Linear.__name__
    return (nn.Embedding if isinstance(module, WideningEmbedding) else type(module)).__name__


def model_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a model computes in: transformers' `dtype` is what its first parameter is kept in."""
    embedding = model.get_input_embeddings()
    return embedding.dtype if isinstance(embedding, WideningEmbedding) else model.dtype


def computed_bytes(model: PreTrainedModel) -> int:
    """Bytes that a model's parameters have in what it computes in."""
    return sum(p.numel() for p in model.parameters()) * model_dtype(model).itemsize


def may_widen(module: nn.Module) -> bool:
    """Whether it is a module that `widen` takes: no subclass, which may compute in its own way."""
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is nn.Linear


@torch.no_grad()
def widen(model: nn.Module, paths: Iterable[str], dtype: torch.dtype) -> None:
    """Have a model compute in `dtype`, the modules at `paths` with weights as they are.

    All other parameters are widened, and what these modules have beside a weight. They must be
    such as `may_widen`.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    kept = {id(module.weight) for module in modules.values()}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _widening(module, dtype))


def _widening(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return WideningEmbedding(module, dtype)
    assert isinstance(module, nn.Linear)
    return WideningLinear(module, dtype)
