"""LoRA on single parameters, such as the stacked weights of a mixture of experts."""

from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.errors import UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.checkpoint import Checkpoint, Part
from dynamic_lora_adapters.lora.single_experts import saved_router, stacked_factors
from dynamic_lora_adapters.lora.targets import ParameterTarget

if TYPE_CHECKING:
    import torch


def merged_parameter(
    target: ParameterTarget, checkpoint: Checkpoint, geometry: BaseGeometry, base: BaseWeights
) -> "torch.Tensor":
    """The parameter with its delta added, in fp32, by PEFT's own function."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import ParamWrapper

    path, _, leaf = target.name.rpartition(".")
    a, b = _factors(target, checkpoint, geometry)
    holder: Any = torch.nn.Module()
    weight = base.parameter(target.name)
    holder.register_parameter(leaf, torch.nn.Parameter(weight, requires_grad=False))
    holder.is_transposed = path in geometry.transposed_experts
    config = LoraConfig(r=target.rank, lora_alpha=target.rank, init_lora_weights=False)
    # PEFT fills its factors at random before they are set.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        wrapper: Any = ParamWrapper(
            holder, "default", parameter_name=leaf, config=config, r=target.rank, lora_alpha=1
        )
        wrapper.scaling["default"] = target.scaling
        wrapper.lora_A["default"].weight.copy_(a)
        wrapper.lora_B["default"].weight.copy_(b)
        delta: torch.Tensor = wrapper.get_delta_weight("default")
    return weight + delta


def _factors(
    target: ParameterTarget, checkpoint: Checkpoint, geometry: BaseGeometry
) -> "tuple[torch.Tensor, torch.Tensor]":
    sizes = _sizes(target.name, geometry)
    joined = stacked_factors(checkpoint, target.name, target.rank, sizes)
    if joined is not None:
        return joined
    num_experts, in_features, out_features = sizes
    stacked = target.rank * num_experts
    path = saved_router(checkpoint, target.wrapper)
    a = checkpoint.take(path, Part.A, (stacked, in_features), rank_axis=0)
    b = checkpoint.take(path, Part.B, (out_features, stacked), rank_axis=1)
    return a, b


def _sizes(name: str, geometry: BaseGeometry) -> tuple[int, int, int]:
    """Number of experts, input and output features of a parameter."""
    shape = geometry.parameters[name]
    if len(shape) == 2:
        return 1, shape[1], shape[0]
    if len(shape) == 3:
        experts, first, second = shape
        transposed = name.rpartition(".")[0] in geometry.transposed_experts
        return (experts, first, second) if transposed else (experts, second, first)
    raise UnsupportedAdapter(
        f"target_parameters names {name!r}, which has {len(shape)} dimensions; 2 or 3 are served.",
        field="target_parameters",
    )
