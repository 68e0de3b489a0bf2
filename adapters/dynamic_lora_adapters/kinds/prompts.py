"""Kinds that put virtual tokens before a prompt."""

from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry, LayerGeometry
from dynamic_lora_adapters.kinds.spec import KindSpec
from dynamic_lora_adapters.kinds.tensors import header_shapes, read_tensors
from dynamic_lora_adapters.terms import AdapterTerms, PromptTerms

if TYPE_CHECKING:
    import torch

_TENSOR = "prompt_embeddings"
_FIX = "Upload an adapter that was trained on the served base model."


def read_prompt(folder: Path, spec: KindSpec, geometry: BaseGeometry) -> AdapterTerms:
    """Prompt tuning (Lester et al. 2021) or p-tuning (Liu et al. 2021).

    PEFT saves what p-tuning's encoder makes, not the encoder. The embeddings
    enter the model as they are: a factor that the model puts on its tokens'
    embeddings does not apply to them.
    """
    num_tokens, hidden_size = spec.values["num_virtual_tokens"], _embedding_size(geometry)
    _check_base("token_dim", spec, hidden_size, "values in an embedding")
    found = header_shapes(folder).get(_TENSOR)
    if found is not None and len(found) == 2 and found[1] != hidden_size:
        raise IncompatibleAdapter(
            f"The tensor {_TENSOR!r} has shape {list(found)}; the base model's embeddings have "
            f"{hidden_size} values.",
            field=_TENSOR,
            fix=_FIX,
        )
    tensor = read_tensors(folder, {_TENSOR: (num_tokens, hidden_size)})[_TENSOR]
    return AdapterTerms(prompt=PromptTerms(num_tokens=num_tokens, embeddings=tensor))


def read_prefix(folder: Path, spec: KindSpec, geometry: BaseGeometry) -> AdapterTerms:
    """Prefix tuning (Li & Liang 2021), with or without a projection.

    PEFT saves what the projection makes: per virtual token, for each layer the
    keys of all KV heads, then their values.
    """
    num_tokens, width = spec.values["num_virtual_tokens"], spec.values["token_dim"]
    heads = spec.values["num_attention_heads"]
    _check_base("num_layers", spec, geometry.num_layers, "layers")
    if width is None or heads is None or width % heads:
        raise InvalidAdapter(
            f"token_dim = {width} must be a multiple of num_attention_heads = {heads}.",
            field="token_dim",
        )
    _check_kv(width, heads, geometry)
    shape = (num_tokens, geometry.num_layers * 2 * width)
    tensor = read_tensors(folder, {_TENSOR: shape})[_TENSOR]
    past = tensor.view(num_tokens, geometry.num_layers, 2, heads, width // heads)
    return AdapterTerms(
        prompt=PromptTerms(
            num_tokens=num_tokens, keys=_per_layer(past, 0), values=_per_layer(past, 1)
        )
    )


def _embedding_size(geometry: BaseGeometry) -> int:
    sizes = {shape.dim for shape in geometry.embeddings.values()}
    if len(sizes) != 1:
        raise UnsupportedAdapter(
            f"{geometry.model_id!r} has no plain token embedding that virtual tokens could enter.",
            field="peft_type",
        )
    return sizes.pop()


def _per_layer(past: "torch.Tensor", which: int) -> "tuple[torch.Tensor, ...]":
    return tuple(past[:, layer, which].contiguous() for layer in range(past.shape[1]))


def _check_base(key: str, spec: KindSpec, of_base: int, what: str) -> None:
    value = spec.values[key]
    if value is not None and value != of_base:
        raise IncompatibleAdapter(
            f"{key} = {value}, but the base model has {of_base} {what}.", field=key, fix=_FIX
        )


def _check_kv(width: int, heads: int, geometry: BaseGeometry) -> None:
    """Hold keys and values of all heads together, `width` values, against every layer's."""
    layer = _kv_sizes(geometry)
    if heads != layer.num_kv_heads:
        raise IncompatibleAdapter(
            f"num_attention_heads = {heads}, but the base model has {layer.num_kv_heads} heads of "
            "keys and values in a layer.",
            field="num_attention_heads",
            fix=_FIX,
        )
    if width != heads * layer.key_dim:
        raise IncompatibleAdapter(
            f"token_dim = {width}, but a layer of the base model makes keys of {heads} x "
            f"{layer.key_dim} values.",
            field="token_dim",
            fix=_FIX,
        )


def _kv_sizes(geometry: BaseGeometry) -> LayerGeometry:
    """Of every layer: a prefix has keys and values of one size for all."""
    sizes = set(geometry.layers)
    layer = sizes.pop() if sizes else None
    if layer is None or sizes or layer.key_dim != layer.value_dim:
        raise UnsupportedAdapter(
            f"{geometry.model_id!r} has no keys and values of one size in all layers, which "
            "prefix tuning needs.",
            field="peft_type",
        )
    return layer
