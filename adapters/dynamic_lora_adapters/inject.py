"""The only place that edits a model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_lora_adapters.groups import ProjectionGroup
from dynamic_lora_adapters.layers import DeltaSite, GroupedProjection, LoraLinear, OutputLinear
from dynamic_lora_adapters.products import base_product


def observe_groups(
    model: nn.Module, paths: Iterable[str], trial: Callable[[], object]
) -> list[ProjectionGroup]:
    """Run `trial` (a forward pass of `model`) and group layers by shared input.

    Layers called one after another with the same tensor object, and alike in
    dtype and bias, form a group. A layer that the trial does not reach is a
    group of its own.
    """
    calls: list[tuple[str, nn.Linear, torch.Tensor]] = []

    def recorder(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Linear)
            # Keeping the tensor alive keeps its identity unique.
            calls.append((path, module, args[0]))

        return record

    linears = {path: _linear(model, path) for path in paths}
    handles = [m.register_forward_pre_hook(recorder(path)) for path, m in linears.items()]
    try:
        trial()
    finally:
        for handle in handles:
            handle.remove()
    return _group_calls(calls, linears)


def _group_calls(
    calls: list[tuple[str, nn.Linear, torch.Tensor]], linears: dict[str, nn.Linear]
) -> list[ProjectionGroup]:
    groups: list[list[str]] = []
    previous: torch.Tensor | None = None
    seen: set[str] = set()
    for path, module, x in calls:
        if path in seen:
            continue
        seen.add(path)
        if x is previous and _joinable(linears[groups[-1][-1]], module):
            groups[-1].append(path)
        else:
            groups.append([path])
        previous = x
    groups += [[path] for path in linears if path not in seen]
    return [_describe(group, linears) for group in groups]


def _joinable(first: nn.Linear, second: nn.Linear) -> bool:
    return (
        first.weight.dtype == second.weight.dtype
        and first.weight.device == second.weight.device
        and (first.bias is None) == (second.bias is None)
    )


def _describe(paths: list[str], linears: dict[str, nn.Linear]) -> ProjectionGroup:
    members = [linears[path] for path in paths]
    return ProjectionGroup(
        tuple(paths), members[0].in_features, tuple(m.out_features for m in members)
    )


def inject(
    model: nn.Module, groups: Iterable[ProjectionGroup], *, packed: bool = False
) -> DeltaSite:
    """Replace every layer of the groups by one that adds deltas; returns the shared site.

    The weights of a group are joined into one tensor and the members' become
    views of it, so `state_dict` keeps its keys. With `packed` the products
    read packed copies, which take as much memory again.
    """
    site = DeltaSite()
    for index, group in enumerate(groups):
        members = [_linear(model, path) for path in group.paths]
        product = base_product(*_join_weights(members), packed=packed)
        projection = GroupedProjection(group, index, site, product)
        for number, (path, member) in enumerate(zip(group.paths, members, strict=True)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoraLinear(member, projection, number))
    return site


def pack_output(model: PreTrainedModel) -> None:
    """Let the output embedding (`lm_head`) multiply by a packed copy of its weight."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not isinstance(head, LoraLinear):
        product = base_product(head.weight.data, head.bias, packed=True)
        model.set_output_embeddings(OutputLinear(head, product))


@torch.no_grad()
def _join_weights(members: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    widths = [member.out_features for member in members]
    weight = members[0].weight.data
    bias = None if members[0].bias is None else members[0].bias.data
    if len(members) == 1:
        return weight, bias
    weight = torch.cat([member.weight.data for member in members])
    for member, view in zip(members, weight.split(widths), strict=True):
        member.weight = nn.Parameter(view, requires_grad=False)
    if bias is not None:
        bias = torch.cat([member.bias.data for member in members])
        for member, view in zip(members, bias.split(widths), strict=True):
            member.bias = nn.Parameter(view, requires_grad=False)
    return weight, bias


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{path} is a {type(module).__name__}, not a Linear")
    return module
