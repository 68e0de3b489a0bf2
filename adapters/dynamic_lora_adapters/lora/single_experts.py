"""Experts that were adapted one by one, as transformers 4 had them, stacked as PEFT stacks them.

Under transformers 5 the experts of a layer are two parameters. PEFT turns the config of
such an adapter into one of these parameters, and joins the factors of all experts.
"""

import dataclasses
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.errors import UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.checkpoint import Checkpoint, Part
from dynamic_lora_adapters.lora.patterns import prove_fast
from dynamic_lora_adapters.lora.spec import ALL_LINEAR, LoraSpec

if TYPE_CHECKING:
    import torch

_SINGLE = re.compile(r".+\.experts\.\d+\..+")
# The layers of one expert that a parameter is made of, in its order, by family.
_LAYERS = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
}


def stacked_spec(spec: LoraSpec, checkpoint: Checkpoint, geometry: BaseGeometry) -> LoraSpec:
    """`spec` with parameters as targets where the file has single experts, or routers, as layers.

    By PEFT's own function. Raises `UnsupportedAdapter` where PEFT does not stack them,
    `InvalidAdapter` for a pattern that takes unreasonably long to match.
    """
    singles = [path for path in checkpoint.left(Part.A) if _SINGLE.fullmatch(path)]
    singles = [path for path in singles if path not in geometry.modules]
    if not singles:
        return _with_routers(spec, checkpoint, geometry)
    if isinstance(spec.target_modules, str) and spec.target_modules.lower() == ALL_LINEAR:
        raise _refusal(checkpoint, singles[0], f"{ALL_LINEAR!r} does not tell which they were.")
    prove_fast(spec.patterns(), _matched_names(geometry))
    try:
        stacked = _converted(spec, geometry)
    except (ValueError, re.error) as error:
        raise _refusal(checkpoint, singles[0], str(error)) from None
    parameters = stacked.target_parameters
    if "down_proj" not in parameters:
        # PEFT would then look for the factors of the other parameter under another name.
        reason = "PEFT stacks them only where all layers of an expert are adapted."
        raise _refusal(checkpoint, singles[0], reason)
    return stacked


def _with_routers(spec: LoraSpec, checkpoint: Checkpoint, geometry: BaseGeometry) -> LoraSpec:
    """`spec` with routers as parameters, which they are now, of a file without single experts."""
    others = {*geometry.linears, *geometry.embeddings, *geometry.heads}
    routers = {name.removesuffix(".weight") for name in geometry.parameters} - others
    saved = {saved_router(checkpoint, path) for path in routers}
    if isinstance(spec.target_modules, str) or saved.isdisjoint(checkpoint.left(Part.A)):
        return spec
    try:
        return _converted(spec, geometry)
    except ValueError:  # the config lists a part of an expert's layers, of which the file has none
        return spec


def stacked_factors(
    checkpoint: Checkpoint, name: str, rank: int, sizes: tuple[int, int, int]
) -> "tuple[torch.Tensor, torch.Tensor] | None":
    """The factors of parameter `name`, joined from its experts' own; None if it has none.

    `rank` is that of one expert in the joined factors, `sizes` the number of experts and
    the parameter's input and output features. Shapes: [experts * rank, in] and
    [out, rank * experts], as PEFT has them. Raises `InvalidAdapter` as `Checkpoint.take`.
    """
    import torch

    module, _, leaf = name.rpartition(".")
    path, layers = _saved_as(checkpoint, module, leaf)
    if not layers:
        return None
    experts, in_features, out_features = sizes
    one, width = rank // len(layers), out_features // len(layers)
    a, b = [], []
    for expert in range(experts):
        paths = [f"{path}.{expert}.{layer}" for layer in layers]
        a += [checkpoint.take(p, Part.A, (one, in_features), rank_axis=0) for p in paths]
        own = [checkpoint.take(p, Part.B, (width, one), rank_axis=1) for p in paths]
        b.append(torch.block_diag(*own))
    joined = torch.stack(b).permute(2, 0, 1).flatten(0, 1)
    return torch.cat(a), joined.T.contiguous()


def saved_router(checkpoint: Checkpoint, path: str) -> str:
    """The path under which the file has the factors of a router, which Mixtral's renamed."""
    older = path.replace(".mlp.", ".block_sparse_moe.")
    return older if checkpoint.has(older, Part.A) else path


def _saved_as(checkpoint: Checkpoint, module: str, leaf: str) -> tuple[str, tuple[str, ...]]:
    for path in (module, module.replace(".mlp.", ".block_sparse_moe.")):
        for layers in _LAYERS.get(leaf, ()):
            if checkpoint.has(f"{path}.0.{layers[0]}", Part.A):
                return path, layers
    return module, ()


def _matched_names(geometry: BaseGeometry) -> list[str]:
    """All that PEFT matches a pattern with: layers of experts go by names that they had."""
    names = {*geometry.modules, *geometry.parameters}
    for name in geometry.parameters:
        module, _, leaf = name.rpartition(".")
        names |= {f"{module}.{layer}" for layers in _LAYERS.get(leaf, ()) for layer in layers}
    return sorted(names)


def _converted(spec: LoraSpec, geometry: BaseGeometry) -> LoraSpec:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import _convert_peft_config_moe

    targets = spec.target_modules
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=spec.exclude_modules,  # type: ignore[arg-type]
        modules_to_save=list(spec.modules_to_save),
        target_parameters=list(spec.target_parameters),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
    )
    # What it looks at of the model.
    model: Any = SimpleNamespace(
        config=SimpleNamespace(model_type=geometry.model_type),
        named_modules=geometry.modules.items,
        named_parameters=geometry.parameters.items,
    )
    _convert_peft_config_moe(config, model)
    return dataclasses.replace(
        spec,
        target_modules=tuple(sorted(config.target_modules or ())),
        target_parameters=tuple(sorted(config.target_parameters or ())),
        rank_pattern=tuple((config.rank_pattern or {}).items()),
        alpha_pattern=tuple((config.alpha_pattern or {}).items()),
    )


def _refusal(checkpoint: Checkpoint, path: str, reason: str) -> UnsupportedAdapter:
    name = checkpoint.name(path, Part.A)
    return UnsupportedAdapter(
        f"The tensor {name!r} is for an expert that is a layer of its own, as transformers 4 "
        f"had them; in this base model the experts of a layer are one. {reason}",
        field=name,
        fix="Train the adapter under transformers 5.",
    )
