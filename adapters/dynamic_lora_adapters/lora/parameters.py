"""The base's own parameters as a checkpoint holds them: with new values, or copied.

PEFT saves new values for `modules_to_save` and `bias`. Copies it saves of embedding and
head with `save_embedding_layers`, which it sets by itself where the vocabulary was
resized, and then of all that is below the wrapper of a module that it replaces or whose
rows it trains; with `bias="all"` it does that for the biases of replaced modules.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.checkpoint import Checkpoint, Part
from dynamic_lora_adapters.lora.replaced import Changes
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.lora.targets import Target, saved_modules

if TYPE_CHECKING:
    import torch

_NO_BIASES = (
    "bias is 'lora_only', but the file has no trained biases, as earlier releases of PEFT "
    "saved it: the base's own are used, as PEFT does."
)


def replaced_values(
    spec: LoraSpec, checkpoint: Checkpoint, geometry: BaseGeometry, targets: Iterable[Target]
) -> "tuple[dict[str, torch.Tensor], list[str]]":
    """The parameters that `modules_to_save` and `bias` give new values, and notes.

    Raises `InvalidAdapter` for a missing one, `IncompatibleAdapter` for the shape of
    another base model.
    """
    saved = tuple(f"{path}." for path in saved_modules(spec, geometry))
    biases, notes = _target_biases(spec, checkpoint, geometry, targets)
    names = [
        name
        for name in geometry.parameters
        if name.startswith(saved)
        or (spec.bias == "all" and name.endswith(".bias"))
        or name in biases
    ]
    return {name: _take(checkpoint, geometry, name) for name in names}, notes


def read_copies(
    checkpoint: Checkpoint, geometry: BaseGeometry, values: "Mapping[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """Embedding and head as the file holds them unasked, by the parameter's name.

    PEFT loads them into the base itself, which rounds them to what it is held in: of a tied
    pair one changes the other. `values`
    are the parameters that the adapter replaces; they hide what was loaded. Raises
    `InvalidAdapter` for copies that differ, `IncompatibleAdapter` for those of another
    vocabulary.
    """
    for name in checkpoint.left(Part.REPEATED):
        if name in values:
            _check_repeated(checkpoint, geometry, name, values[name])
    wanted = _embedding_parameters(geometry)
    copies: dict[str, torch.Tensor] = {}
    for part in (Part.PARAMETER, Part.ORIGINAL):
        for name in checkpoint.left(part):
            if name in wanted and name not in copies:
                copies[name] = _rounded(_take(checkpoint, geometry, name, part), geometry)
            elif part is Part.ORIGINAL and name in values:
                _take(checkpoint, geometry, name, part)  # hidden by the new value
    return copies | _tied(copies, geometry)


def copy_notes(
    copies: "Mapping[str, torch.Tensor]", values: "Mapping[str, torch.Tensor]", changes: Changes
) -> list[str]:
    """What the uploader should know of the file's copies, of which `changes` came."""
    return [
        f"The file's own {name!r} differs from the base's and takes its place."
        if name not in values and _differs(name, changes)
        else f"The file holds a copy of the base's {name!r}, which is left out."
        for name in copies
    ]


def _target_biases(
    spec: LoraSpec, checkpoint: Checkpoint, geometry: BaseGeometry, targets: Iterable[Target]
) -> tuple[set[str], list[str]]:
    if spec.bias != "lora_only":
        return set(), []
    biases = {f"{target.path}.bias" for target in targets} & geometry.parameters.keys()
    # Once PEFT looked for them under names that they no longer had.
    if biases and not any(checkpoint.has(name) for name in biases):
        return set(), [_NO_BIASES]
    return biases, []


def _take(
    checkpoint: Checkpoint, geometry: BaseGeometry, name: str, part: Part = Part.PARAMETER
) -> "torch.Tensor":
    shape, found = geometry.parameters[name], checkpoint.shape(name, part)
    resized = len(found) == len(shape) and found[0] != shape[0] and found[1:] == shape[1:]
    if resized and name in _embedding_parameters(geometry):
        raise IncompatibleAdapter(
            f"The tensor {checkpoint.name(name, part)!r} has shape {list(found)}; {list(shape)} "
            f"is needed: the vocabulary was resized from {shape[0]} to {found[0]}.",
            field=checkpoint.name(name, part),
            fix=f"Serve the base model with its vocabulary resized to {found[0]}, as it was "
            "trained on.",
        )
    return checkpoint.take(name, part, shape)


def _rounded(copy: "torch.Tensor", geometry: BaseGeometry) -> "torch.Tensor":
    dtype = geometry.embedding_dtype
    return copy if dtype is None else copy.to(dtype).to(copy.dtype)


def _check_repeated(
    checkpoint: Checkpoint, geometry: BaseGeometry, name: str, value: "torch.Tensor"
) -> None:
    if not _take(checkpoint, geometry, name, Part.REPEATED).equal(value):
        repeated = checkpoint.name(name, Part.REPEATED)
        raise InvalidAdapter(
            f"{checkpoint.name(name)!r} and {repeated!r} are the same new value but differ.",
            field=repeated,
        )


def _embedding_parameters(geometry: BaseGeometry) -> set[str]:
    names = _embedding_weights(geometry) + [f"{path}.bias" for path in geometry.heads]
    return geometry.parameters.keys() & names


def _embedding_weights(geometry: BaseGeometry) -> list[str]:
    return [f"{path}.weight" for path in (*geometry.embeddings, *geometry.heads)]


def _tied(
    copies: "Mapping[str, torch.Tensor]", geometry: BaseGeometry
) -> "dict[str, torch.Tensor]":
    """The copies of a tied pair, one for both; empty where there are none."""
    weights = _embedding_weights(geometry)
    found = [(name, copies[name]) for name in weights if name in copies]
    if not found or not geometry.tied:
        return {}
    (name, first), *others = found
    for other, value in others:
        if not value.equal(first):
            raise InvalidAdapter(
                f"The copies of {name!r} and {other!r} differ; the base model has one for both.",
                field=other,
            )
    return dict.fromkeys(weights, first)


def _differs(name: str, changes: Changes) -> bool:
    path, _, leaf = name.rpartition(".")
    return path in changes.bias if leaf == "bias" else path in {**changes.dense, **changes.rows}
