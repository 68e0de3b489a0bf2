"""What a Llama layer is made of, read from a model and checked against its sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.layers import GroupedProjection
from dynamic_lora_adapters.apply.widening import may_widen
from dynamic_lora_adapters.native.layer import LayerParts, Site
from dynamic_lora_adapters.native.norm import NativeRmsNorm
from dynamic_lora_adapters.native.product import NativeProduct
from dynamic_lora_server.engine.attention.packed import Rule

_FRAME_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Unsuited(Exception):
    """The model's layers are not of the one kind that is taken over; the text says why."""


@dataclass(frozen=True, slots=True)
class LlamaFrame:
    """What is around the decoder layers: modules, called as transformers calls them."""

    embed: nn.Module
    rotary: nn.Module
    norm: nn.Module
    head: nn.Module


def llama_frame(model: PreTrainedModel) -> LlamaFrame:
    """What is around the model's layers. Raises Unsuited if these are not Llama's parts."""
    backbone, head = model.base_model, model.get_output_embeddings()
    parts = _children(backbone)
    if parts != _FRAME_PARTS or head is None:
        raise Unsuited(f"the model is made of {', '.join(sorted(parts))}")
    return LlamaFrame(
        embed=backbone.get_submodule("embed_tokens"),
        rotary=backbone.get_submodule("rotary_emb"),
        norm=backbone.get_submodule("norm"),
        head=head,
    )


def has_llama_layers(model: PreTrainedModel) -> bool:
    """Whether all decoder layers have the parts of a Llama layer, by name."""
    return len(layer_paths(model)) == int(model.config.num_hidden_layers)


def layer_paths(model: PreTrainedModel) -> list[str]:
    """Where modules with the parts of a Llama layer are, in the model's order."""
    return [p for p, m in model.named_modules() if _children(m) == _LAYER_PARTS]


def widening_paths(model: PreTrainedModel) -> list[str]:
    """The modules of a model in sixteen bits whose weights may stay so while it computes in more.

    Empty if layers are not made as Llama's, or if it has made anything else of this dtype than
    its parameters: that may have been rounded.
    """
    if not has_llama_layers(model) or any(b.dtype == model.dtype for b in model.buffers()):
        return []
    parents = {f"{path}.{part}" for path in layer_paths(model) for part in ("self_attn", "mlp")}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not all(map(may_widen, ends)):
        return []  # they may share a weight
    return [
        path
        for path, module in model.named_modules()
        if module in ends or (path.rpartition(".")[0] in parents and may_widen(module))
    ]


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def layer_parts(
    model: PreTrainedModel,
    path: str,
    projections: Sequence[GroupedProjection],
    rule: Rule,
    keys: torch.Tensor,
) -> LayerParts:
    """What the layer at `path` is made of; `keys` is its table in the KV cache.

    Raises Unsuited if it is not made, or not sized, as Llama's.
    """
    layer, attention = model.get_submodule(path), model.get_submodule(f"{path}.self_attn")
    names = _children(attention)
    if names - _HEAD_NORMS != _PROJECTIONS or names & _HEAD_NORMS not in (set(), _HEAD_NORMS):
        raise Unsuited(f"attention is made of {', '.join(sorted(names))}")
    if _children(model.get_submodule(f"{path}.mlp")) != _MLP_PARTS:
        raise Unsuited("the layers have no gated MLP")
    if rule.sinks is not None or rule.softcap is not None:
        raise Unsuited("attention has sinks or a soft cap")
    qkv, (q, k, v) = _packed(projections, [f"{path}.self_attn.{name}_proj" for name in "qkv"])
    gate_up, (gate, up) = _packed(projections, [f"{path}.mlp.{n}_proj" for n in ("gate", "up")])
    o, _ = _packed(projections, [f"{path}.self_attn.o_proj"])
    down, _ = _packed(projections, [f"{path}.mlp.down_proj"])
    parts = LayerParts(
        input_norm=_norm(layer, "input_layernorm"),
        middle_norm=_norm(layer, "post_attention_layernorm"),
        q_norm=_norm(attention, "q_norm") if "q_norm" in names else None,
        k_norm=_norm(attention, "k_norm") if "k_norm" in names else None,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        heads=len(q) // keys.shape[2],
        kv_heads=keys.shape[1],
        dim=keys.shape[2],
        q=q.start,
        k=k.start,
        v=v.start,
        gate=gate.start,
        up=up.start,
        scaling=rule.scaling,
    )
    if not _fits(parts, widths=[len(part) for part in (q, k, v, gate, up)]):
        raise Unsuited("the layers' sizes are not Llama's")
    return parts


def _fits(parts: LayerParts, widths: list[int]) -> bool:
    """Whether all sizes agree, for C++ reads and writes by them; `widths` of q, k, v, gate, up."""
    qkv, o, gate_up, down = (
        site.base.projection for site in (parts.qkv, parts.o, parts.gate_up, parts.down)
    )
    hidden, new = o.n, parts.kv_heads * parts.dim
    head_norms = [norm for norm in (parts.q_norm, parts.k_norm) if norm is not None]
    return (
        widths == [parts.heads * parts.dim, new, new, down.k, down.k]
        and o.k == widths[0]
        and parts.heads % parts.kv_heads == 0
        and qkv.k == gate_up.k == down.n == hidden
        and len(parts.input_norm.weight) == len(parts.middle_norm.weight) == hidden
        and all(len(norm.weight) == parts.dim for norm in head_norms)
    )


def _packed(projections: Sequence[GroupedProjection], paths: list[str]) -> tuple[Site, list[range]]:
    """The projection of exactly these paths, and the columns of each in its output."""
    for projection in projections:
        group = projection.group
        if set(group.paths) == set(paths):
            if not isinstance(projection.base, NativeProduct):
                raise Unsuited("its products are not in C++")
            stops = dict(zip(group.paths, accumulate(group.widths), strict=True))
            widths = dict(zip(group.paths, group.widths, strict=True))
            columns = [range(stops[path] - widths[path], stops[path]) for path in paths]
            return Site(projection.base, projection.index), columns
    raise Unsuited(f"{' and '.join(paths)} do not share their input alone")


def _norm(module: nn.Module, name: str) -> NativeRmsNorm:
    norm = getattr(module, name).forward
    if not isinstance(norm, NativeRmsNorm):
        raise Unsuited(f"{name} is not in C++")
    return norm
