"""Kinds that replace what is no linear layer: norms, and rows of the token embedding."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.kinds.spec import KindSpec
from dynamic_lora_adapters.kinds.tensors import read_tensors
from dynamic_lora_adapters.lora.patterns import prove_fast
from dynamic_lora_adapters.lora.replaced import check_rows
from dynamic_lora_adapters.lora.tokens import embedding_rows, head_rows
from dynamic_lora_adapters.terms import AdapterTerms, ModuleOverride

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_NORM = ".ln_tuning_layers."
_FIX = "Upload an adapter that was trained on the served base model."


def read_norms(folder: Path, spec: KindSpec, geometry: BaseGeometry) -> AdapterTerms:
    """LayerNorm tuning (Zhao et al. 2023): trained norms in place of the base's.

    Raises `UnsupportedAdapter` for a target that is no norm.
    """
    shapes = {}
    for path in _matched(spec, geometry):
        if "norm" not in geometry.modules[path].lower():
            raise UnsupportedAdapter(
                f"target_modules matches {path!r} ({geometry.modules[path]}), which is no norm.",
                field="target_modules",
                fix="Train the adapter with norms alone as target_modules.",
            )
        check_rows(path, geometry, field="target_modules")
        for leaf in ("weight", "bias"):
            if (name := f"{path}.{leaf}") in geometry.parameters:
                shapes[f"{_PREFIX}{path}{_NORM}{leaf}"] = geometry.parameters[name]
    parameters: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(folder, shapes).items():
        path, _, leaf = name.removeprefix(_PREFIX).partition(_NORM)
        parameters.setdefault(path, {})[leaf] = tensor
    return AdapterTerms(
        overrides={path: ModuleOverride(parameters=found) for path, found in parameters.items()}
    )


def read_tokens(
    folder: Path, spec: KindSpec, geometry: BaseGeometry, base: BaseWeights
) -> AdapterTerms:
    """Trainable tokens: new embeddings for a few tokens, in a tied output head too.

    Raises `UnsupportedAdapter` for a target that is not the token embedding,
    `IncompatibleAdapter` for a token that the base model does not have.
    """
    import torch

    embedding = _embedding(spec, geometry)
    ids, shape = spec.values["token_indices"], geometry.embeddings[embedding]
    if max(ids) >= shape.num_tokens:
        raise IncompatibleAdapter(
            f"token_indices names token {max(ids)}; the base model has {shape.num_tokens} tokens.",
            field="token_indices",
            fix=_FIX,
        )
    heads = list(geometry.heads) if geometry.tied else []
    names = [f"{_PREFIX}{path}.trainable_tokens_delta" for path in (embedding, *heads)]
    first, *others = read_tensors(folder, dict.fromkeys(names, (len(ids), shape.dim))).values()
    if any(not other.equal(first) for other in others):
        raise InvalidAdapter(
            f"The tensors {' and '.join(names)} differ, but the base model ties their layers.",
            field=names[-1],
        )
    rows = first - base.parameter(f"{embedding}.weight", ids)
    token_ids = torch.tensor(ids, dtype=torch.int64)
    return AdapterTerms(
        embeddings={embedding: embedding_rows(token_ids, rows)},
        linears={head: head_rows(token_ids, rows, shape.num_tokens) for head in heads},
    )


def _matched(spec: KindSpec, geometry: BaseGeometry) -> list[str]:
    """The modules that `target_modules` names and `exclude_modules` does not, as PEFT says.

    Raises `IncompatibleAdapter` for none, `InvalidAdapter` for a slow expression.
    """
    assert spec.targets is not None
    wanted, excluded = spec.targets.target_modules, spec.targets.exclude_modules or ()
    prove_fast(spec.targets.patterns(), list(geometry.modules))
    paths = [
        path
        for path in geometry.modules
        if _names(wanted, path) and not (excluded and _names(excluded, path))
    ]
    if not paths:
        shown = repr(wanted if isinstance(wanted, str) else list(wanted))[:200]
        raise IncompatibleAdapter(
            f"target_modules {shown} matches no module of {geometry.model_id!r}.",
            field="target_modules",
            fix=_FIX,
        )
    return paths


def _names(names: Iterable[str] | str, path: str) -> bool:
    """Whether a path is, or ends with, one of a list of names, or is what an expression matches."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _embedding(spec: KindSpec, geometry: BaseGeometry) -> str:
    paths = _matched(spec, geometry)
    if paths != list(geometry.embeddings):
        raise UnsupportedAdapter(
            f"target_modules matches {', '.join(paths)}; trained tokens are served in the "
            "token embedding alone.",
            field="target_modules",
        )
    return paths[0]
