"""The only place that edits a model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynamic_lora_adapters.apply.layers import DeltaSite, GroupedProjection, LoraConv1D, LoraLinear
from dynamic_lora_adapters.apply.products import ProductKind, make_product
from dynamic_lora_adapters.apply.widening import dtype_of
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.weight import Weight, in_one

AnyLinear = nn.Linear | Conv1D


def observe_groups(
    model: nn.Module, paths: Iterable[str], trial: Callable[[], object]
) -> list[ProjectionGroup]:
    """Run `trial` (a forward pass of `model`) and group layers by shared input.

    Layers called one after another with the same tensor object, and alike in
    dtype and bias, form a group. A layer that the trial does not reach is a
    group of its own.
    """
    calls: list[tuple[str, AnyLinear, torch.Tensor]] = []

    def recorder(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, AnyLinear)
            # Keeping the tensor alive keeps its identity unique.
            calls.append((path, module, args[0]))

        return record

    linears = {path: linear_at(model, path) for path in paths}
    handles = [m.register_forward_pre_hook(recorder(path)) for path, m in linears.items()]
    try:
        trial()
    finally:
        for handle in handles:
            handle.remove()
    return _group_calls(calls, linears)


def _group_calls(
    calls: list[tuple[str, AnyLinear, torch.Tensor]], linears: dict[str, AnyLinear]
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


def _joinable(first: AnyLinear, second: AnyLinear) -> bool:
    return (
        isinstance(first, nn.Linear)
        and isinstance(second, nn.Linear)
        and dtype_of(first) == dtype_of(second)
        and first.weight.device == second.weight.device
        and (first.bias is None) == (second.bias is None)
    )


def _describe(paths: list[str], linears: dict[str, AnyLinear]) -> ProjectionGroup:
    shapes = [weight_of(linears[path]).shape for path in paths]
    return ProjectionGroup(tuple(paths), shapes[0][1], tuple(shape[0] for shape in shapes))


def head_group(model: PreTrainedModel) -> ProjectionGroup | None:
    """The output head as a group of its own; None if it is no linear layer."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head and isinstance(head, nn.Linear):
            return ProjectionGroup((path,), head.in_features, (head.out_features,), is_head=True)
    return None


def linear_at(model: nn.Module, path: str) -> AnyLinear:
    """The linear layer at a module path. Raises TypeError for any other module."""
    module = model.get_submodule(path)
    if not isinstance(module, AnyLinear):
        raise TypeError(f"{path} is a {type(module).__name__}, not a Linear")
    return module


def weight_of(layer: AnyLinear) -> torch.Tensor:
    """The weight of a linear layer as [out, in]; for `Conv1D` a transposed view."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def inject(
    model: nn.Module,
    groups: Iterable[ProjectionGroup],
    *,
    kind: ProductKind = ProductKind.PLAIN,
) -> tuple[DeltaSite, list[GroupedProjection]]:
    """Replace every layer of the groups by one that adds an adapter's terms.

    Returns the site that they read and their projections, in the order of the
    groups. PLAIN products read the weights of a group joined into one tensor, of which the
    members' become views, so `state_dict` keeps its keys. Any other `kind` reads packed copies,
    and leaves the weights as they are kept.
    """
    site = DeltaSite()
    projections = []
    for index, group in enumerate(groups):
        members = [linear_at(model, path) for path in group.paths]
        dtype = dtype_of(members[0])
        kept: Weight = tuple(weight_of(member) for member in members)
        if kind is ProductKind.PLAIN:
            kept = _join_weights(members, dtype)
        bias = _join_biases(members)
        halves = len(set(group.widths)) == 1 and len(group.widths) == 2
        # The head may share its weight with the embedding, which a merge must not touch.
        shared = group.is_head
        product = make_product(kind, kept, bias, dtype=dtype, shared=shared, halves=halves)
        transposed = isinstance(members[0], Conv1D)
        projection = GroupedProjection(
            group, index, site, product, kept, bias, dtype=dtype, transposed=transposed
        )
        projections.append(projection)
        for number, (path, member) in enumerate(zip(group.paths, members, strict=True)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _wrapped(member, projection, number))
    return site, projections


def _wrapped(layer: AnyLinear, projection: GroupedProjection, number: int) -> nn.Module:
    if isinstance(layer, Conv1D):
        return LoraConv1D(layer, projection)
    return LoraLinear(layer, projection, number)


@torch.no_grad()
def _join_weights(members: list[AnyLinear], dtype: torch.dtype) -> torch.Tensor:
    weights = tuple(weight_of(member) for member in members)
    whole = in_one(weights, dtype)
    if len(members) == 1 and whole is weights[0]:
        return whole
    for member, view in zip(members, whole.split([*map(len, weights)]), strict=True):
        member.weight = nn.Parameter(view, requires_grad=False)
    return whole


@torch.no_grad()
def _join_biases(members: list[AnyLinear]) -> torch.Tensor | None:
    biases = [member.bias.data for member in members if member.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    joined = torch.cat(biases)
    for member, view in zip(members, joined.split([*map(len, biases)]), strict=True):
        member.bias = nn.Parameter(view, requires_grad=False)
    return joined
