"""Kinds that PEFT's own functions fold into one dense delta a layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.base_weights import BaseWeights, linear_weight
from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.geometry import BaseGeometry, LinearShape
from dynamic_lora_adapters.kinds.replica import ADAPTER
from dynamic_lora_adapters.terms import LinearTerms

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PristineLinears:
    """The base model's linear layers as they were before any adapter."""

    geometry: BaseGeometry
    base: BaseWeights

    def shape(self, path: str) -> LinearShape:
        """The sizes of the layer at `path`, which must be one."""
        shape = self.geometry.linear(path)
        assert shape is not None
        return shape

    def weight(self, path: str) -> "torch.Tensor":
        """W of the layer at `path`, [out, in], in fp32 on the CPU."""
        return linear_weight(self.base, path, self.shape(path))

    def bias(self, path: str) -> "torch.Tensor | None":
        """The bias of the layer at `path`, [out], if it has one."""
        name = f"{path}.bias"
        return self.base.parameter(name) if name in self.geometry.parameters else None


def added_delta(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """The terms of a layer whose delta does not depend on the base weight."""
    del linears
    return LinearTerms(dense=finite_delta(path, layer.get_delta_weight(ADAPTER)))


def sparse_delta(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """The terms of a SHiRA layer (Bhardwaj et al. 2024): single entries of the weight.

    Not left to PEFT's sparse tensors, which take positions unchecked. Raises
    `InvalidAdapter` for a position outside the weight.
    """
    import torch

    shape = linears.shape(path)
    rows, columns = layer.shira_indices[ADAPTER].long()
    for places, size in ((rows, shape.out_features), (columns, shape.in_features)):
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= size):
            raise InvalidAdapter(
                f"The positions saved for {path!r} lie outside its weight of shape "
                f"[{shape.out_features}, {shape.in_features}].",
                field=f"base_model.model.{path}.shira_indices",
            )
    dense = torch.zeros(shape.out_features, shape.in_features)
    values = layer.shira_weight[ADAPTER].detach() * layer.scaling[ADAPTER]
    dense.index_put_((rows, columns), values, accumulate=True)
    return LinearTerms(dense=finite_delta(path, dense))


def merged_delta(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """The terms of a layer that reshapes what the base has: what PEFT merges, less the base."""
    base_layer, weight, bias = layer.get_base_layer(), linears.weight(path), linears.bias(path)
    placeholder = base_layer.weight
    base_layer.weight = _own(weight)
    base_layer.bias = None if bias is None else _own(bias)
    layer.merge(adapter_names=[ADAPTER])
    dense = finite_delta(path, base_layer.weight.data - weight)
    added = None if bias is None else finite_delta(path, base_layer.bias.data - bias)
    # Not kept: the layers of a replica together would hold a second base model.
    base_layer.weight, base_layer.bias = placeholder, None
    return LinearTerms(dense=dense, bias=added if added is not None and bool(added.any()) else None)


def _own(tensor: "torch.Tensor") -> "torch.nn.Parameter":
    import torch

    return torch.nn.Parameter(tensor.clone(), requires_grad=False)


def finite_delta(path: str, delta: "torch.Tensor") -> "torch.Tensor":
    """`delta` in fp32 and contiguous; `InvalidAdapter` where it overflows."""
    import torch

    delta = delta.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(delta).all()):
        raise InvalidAdapter(
            f"What the adapter changes at {path!r} holds NaN or infinite values.",
            field=path,
            fix="The training diverged: train again with a lower learning rate.",
        )
    return delta
