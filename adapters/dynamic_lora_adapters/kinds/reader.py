"""From an adapter's folder to its terms, for every kind but LoRA."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.errors import InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry, LinearShape
from dynamic_lora_adapters.kinds.factored import loha_terms, lokr_terms, vera_terms
from dynamic_lora_adapters.kinds.folded import (
    PristineLinears,
    added_delta,
    merged_delta,
    sparse_delta,
)
from dynamic_lora_adapters.kinds.prompts import read_prefix, read_prompt
from dynamic_lora_adapters.kinds.replaced import read_norms, read_tokens
from dynamic_lora_adapters.kinds.replica import build_replica, calling_peft, config_warnings
from dynamic_lora_adapters.kinds.rotated import read_boft
from dynamic_lora_adapters.kinds.scaled import beft_terms, ia3_terms
from dynamic_lora_adapters.kinds.spec import KindSpec
from dynamic_lora_adapters.kinds.table import TABLE
from dynamic_lora_adapters.kinds.tensors import header_shapes, num_values
from dynamic_lora_adapters.lora.config_values import read_text
from dynamic_lora_adapters.lora.targets import find_targets
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms

_Fold = Callable[[str, Any, PristineLinears], LinearTerms]
_Reader = Callable[[Path, KindSpec, BaseGeometry, BaseWeights], AdapterTerms]

# How a layer of PEFT's becomes terms.
_FOLDS: Mapping[str, _Fold] = {
    "BEFT": beft_terms,
    "C3A": added_delta,
    "DELORA": added_delta,
    "FOURIERFT": added_delta,
    "GRALORA": added_delta,
    "HIRA": merged_delta,
    "HRA": merged_delta,
    "IA3": ia3_terms,
    "LOHA": loha_terms,
    "LOKR": lokr_terms,
    "MISS": merged_delta,
    "OFT": merged_delta,
    "RANDLORA": added_delta,
    "ROAD": merged_delta,
    "SHIRA": sparse_delta,
    "VBLORA": added_delta,
    "VERA": vera_terms,
    "WAVEFT": added_delta,
}


def kind_notes(config: Mapping[str, Any]) -> list[str]:
    """What the uploader of an adapter with this `adapter_config.json` should know.

    Raises what `read_kind` raises for a config.
    """
    read_text(config, "peft_version")
    return config_warnings(KindSpec.parse(config), config)


def read_kind(
    folder: Path, config: Mapping[str, Any], geometry: BaseGeometry, base: BaseWeights
) -> AdapterTerms:
    """Read and check the adapter in `folder`, whose `adapter_config.json` holds `config`.

    Raises `UnsupportedAdapter` for a kind, key or target that is not served,
    `InvalidAdapter` for a broken file or config (naming the tensor or key),
    `IncompatibleAdapter` for an adapter of another base model.
    """
    spec = KindSpec.parse(config)
    return READERS[spec.peft_type](folder, spec, geometry, base)


def _without_base(read: Callable[[Path, KindSpec, BaseGeometry], AdapterTerms]) -> _Reader:
    """A reader that needs nothing of the base but its geometry."""
    return lambda folder, spec, geometry, _: read(folder, spec, geometry)


def _read_layers(
    folder: Path, spec: KindSpec, geometry: BaseGeometry, base: BaseWeights
) -> AdapterTerms:
    """The terms of PEFT's own layers, as `_FOLDS` says."""
    linears, fold = PristineLinears(geometry, base), _FOLDS[spec.peft_type]
    layers = build_replica(folder, spec, _target_shapes(spec, geometry))
    with calling_peft(spec):
        terms = {path: fold(path, layer, linears) for path, layer in layers.items()}
    return AdapterTerms(linears=terms)


def _read_vblora(
    folder: Path, spec: KindSpec, geometry: BaseGeometry, base: BaseWeights
) -> AdapterTerms:
    _check_bank(folder, spec, _target_shapes(spec, geometry))
    return _read_layers(folder, spec, geometry, base)


def _read_boft(
    folder: Path, spec: KindSpec, geometry: BaseGeometry, base: BaseWeights
) -> AdapterTerms:
    paths = list(_target_shapes(spec, geometry))
    return AdapterTerms(linears=read_boft(folder, spec, paths, PristineLinears(geometry, base)))


READERS: Mapping[str, _Reader] = {
    **dict.fromkeys(_FOLDS, _read_layers),
    "BOFT": _read_boft,
    "LN_TUNING": _without_base(read_norms),
    "PREFIX_TUNING": _without_base(read_prefix),
    "PROMPT_TUNING": _without_base(read_prompt),
    "P_TUNING": _without_base(read_prompt),
    "TRAINABLE_TOKENS": read_tokens,
    "VBLORA": _read_vblora,
}
"""What reads each kind of the table."""


def _target_shapes(spec: KindSpec, geometry: BaseGeometry) -> dict[str, LinearShape]:
    assert spec.targets is not None
    shapes = {}
    for target in find_targets(spec.targets, geometry):
        shape = geometry.linear(target.path)
        if shape is None or (shape.transposed and not TABLE[spec.peft_type].conv1d):
            raise UnsupportedAdapter(
                f"target_modules matches {target.path!r} ({geometry.modules[target.path]}), "
                f"which takes no {spec.name} adapter.",
                field="target_modules",
            )
        shapes[target.path] = shape
    return shapes


def _check_bank(folder: Path, spec: KindSpec, shapes: Mapping[str, LinearShape]) -> None:
    """Refuse sizes that are not those of the file before memory is taken for them."""
    features = sum(shape.in_features + shape.out_features for shape in shapes.values())
    values = spec.values
    blocks = features // values["vector_length"]
    needed = values["num_vectors"] * (values["vector_length"] + values["r"] * blocks)
    if (found := num_values(header_shapes(folder))) != needed:
        raise InvalidAdapter(
            f"The config needs {needed} values in all tensors; the file has {found}.",
            field="num_vectors",
            fix="Upload the adapter_config.json that was saved with these weights.",
        )
