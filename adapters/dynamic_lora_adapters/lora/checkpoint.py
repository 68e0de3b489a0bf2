"""The tensors of a PEFT checkpoint, by what they are for; each is taken once, none is left over.

PEFT names them after the module they belong to: `base_model.model.<path>.`
and, for instance, `lora_A.weight`. Older releases put the adapter's name
(`default`) before the last part. What ends in none of the known parts is a
parameter of the base model with a new value, which PEFT may name after the
module inside its wrapper (`<path>.base_layer.weight`). Of a module that it
replaces or whose rows it trains, it may write all that is below its wrapper.
"""

import math
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import AdapterError, IncompatibleAdapter, InvalidAdapter
from dynamic_lora_adapters.files.safetensors_file import (
    READ_DTYPES,
    MappedTensors,
    TensorEntry,
)

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
_OTHER_CONFIG = "Upload the adapter_config.json that was saved with these weights."


class Part(StrEnum):
    """What a tensor is of its module, as PEFT spells it today."""

    A = "lora_A.weight"
    B = "lora_B.weight"
    B_BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    VELORA = "lora_velora_embed"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    TOKENS = "token_adapter.trainable_tokens_delta"
    PARAMETER = ""
    # What PEFT's wrapper holds beside the tensors that count; here the path is the parameter's.
    ORIGINAL = "original_module"
    REPEATED = "modules_to_save"


# Both spellings that PEFT has had for each part; `default` is the adapter's name.
_PATTERNS = {
    Part.A: r"lora_A(\.default)?\.weight",
    Part.B: r"lora_B(\.default)?\.weight",
    Part.B_BIAS: r"lora_B(\.default)?\.bias",
    Part.MAGNITUDE: r"lora_magnitude_vector(\.default)?(\.weight)?",
    Part.VELORA: r"lora_velora_embed(\.default)?",
    Part.EMBEDDING_A: r"lora_embedding_A(\.default)?",
    Part.EMBEDDING_B: r"lora_embedding_B(\.default)?",
    Part.TOKENS: r"token_adapter\.trainable_tokens_delta(\.default)?",
}
_COMPILED = {part: re.compile(rf"(.+)\.{pattern}") for part, pattern in _PATTERNS.items()}
# Before and after what PEFT's wrapper puts into the name of a parameter.
_WRAPPED = {
    Part.ORIGINAL: re.compile(r"(.+)\.(?:original_module|token_adapter\.base_layer)\.(.+)"),
    Part.REPEATED: re.compile(r"(.+)\.modules_to_save(?:\.default)?\.(.+)"),
}

# Which key of the config a tensor needs that was found without it.
_ASKED_BY = {
    Part.B_BIAS: ("a LoRA bias", "lora_bias"),
    Part.MAGNITUDE: ("a DoRA magnitude", "use_dora"),
    Part.VELORA: ("a projection of VeLoRA's training", "velora_config"),
    Part.TOKENS: ("trained token embeddings", "trainable_token_indices"),
}

Key = tuple[str, Part]

# Half of what float32 holds: norms are rounded.
_SURELY_FINITE = 1.7e38


class Checkpoint:
    """An `adapter_model.safetensors` and what has been taken from it.

    `parameters` are the names of the base model's parameters. Raises
    `InvalidAdapter` if the file is broken or a tensor is none that PEFT writes.
    """

    def __init__(self, path: Path, parameters: Iterable[str]) -> None:
        self._file = MappedTensors(path)
        self._names = _by_key(self._file.entries, frozenset(parameters))
        self._taken: set[Key] = set()

    def has(self, path: str, part: Part = Part.PARAMETER) -> bool:
        """Whether the file has this tensor."""
        return (path, part) in self._names

    def left(self, part: Part) -> list[str]:
        """The paths of the tensors of this part that nobody has taken, sorted."""
        return sorted(
            path for path, other in self._names if other is part and (path, part) not in self._taken
        )

    def shape(self, path: str, part: Part) -> tuple[int, ...]:
        """The tensor's shape in the file; raises `InvalidAdapter` if it has none."""
        return self._file.entries[self.name(path, part)].shape

    def name(self, path: str, part: Part = Part.PARAMETER) -> str:
        """The tensor's name in the file; raises `InvalidAdapter` if it has none."""
        name = self._names.get((path, part))
        if name is None:
            missing = f"{PREFIX}{path}.{part}" if part else f"{PREFIX}{path}"
            raise InvalidAdapter(
                f"The config targets {path!r} but the tensor {missing!r} is missing.",
                field=missing,
                fix=_OTHER_CONFIG,
            )
        return name

    def take(
        self,
        path: str,
        part: Part,
        shape: tuple[int, ...],
        *,
        rank_axis: int | None = None,
        factor: float = 1.0,
    ) -> "torch.Tensor":
        """The tensor in fp32, contiguous, times `factor`; it must have `shape` and be finite.

        `rank_axis` is the axis whose size the config gave. Raises
        `InvalidAdapter` for a missing tensor, another rank or values that are
        not finite, `IncompatibleAdapter` for the shape of another base model.
        """
        import torch

        name = self.name(path, part)
        found = self._file.entries[name].shape
        if found != shape:
            raise _misshapen(name, path, found, shape, rank_axis)
        tensor = self._file.tensor(name)
        self._taken.add((path, part))
        tensor = tensor.to(torch.float32)
        tensor = tensor * factor if factor != 1.0 else tensor
        if not self._file.norm * abs(factor) < _SURELY_FINITE:  # NaN too
            check_finite(name, tensor)
        return tensor.contiguous()

    def skip(self, path: str, part: Part) -> None:
        """Count a tensor that changes nothing as taken, if there is one."""
        self._taken.add((path, part))

    def finish(self) -> None:
        """Raise `InvalidAdapter` naming a tensor that nobody has taken."""
        for key, name in self._names.items():
            if key not in self._taken:
                raise _left_over(name, *key)


def check_finite(name: str, tensor: "torch.Tensor") -> None:
    """Raise `InvalidAdapter` for NaN and infinities."""
    # A sum is a pass without a copy. It may overflow where no value does: then all are looked at.
    if math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all()):
        return
    raise InvalidAdapter(
        f"The tensor {name!r} holds NaN or infinite values.",
        field=name,
        fix="The training diverged: train again with a lower learning rate.",
    )


def _by_key(entries: Mapping[str, TensorEntry], parameters: frozenset[str]) -> dict[Key, str]:
    names: dict[Key, str] = {}
    for name, entry in entries.items():
        key = _key(name, parameters)
        if key in names:
            raise InvalidAdapter(f"{names[key]!r} and {name!r} are the same factor.", field=name)
        if entry.dtype not in READ_DTYPES:
            raise InvalidAdapter(
                f"The tensor {name!r} has dtype {entry.dtype}; {', '.join(READ_DTYPES)} are read.",
                field=name,
            )
        names[key] = name
    return names


def _key(name: str, parameters: frozenset[str]) -> Key:
    if name.startswith(PREFIX):
        below = name.removeprefix(PREFIX)
        for part, pattern in _COMPILED.items():
            if match := pattern.fullmatch(below):
                return match[1], part
        plain = below.replace(".base_layer.", ".")
        if plain in parameters:
            return plain, Part.PARAMETER
        for part, pattern in _WRAPPED.items():
            match = pattern.fullmatch(below)
            if match and (path := f"{match[1]}.{match[2]}") in parameters:
                return path, part
    raise InvalidAdapter(
        f"The tensor {name!r} is no LoRA factor.",
        field=name,
        fix=f"PEFT names them '{PREFIX}<module>.lora_A.weight' and '...lora_B.weight'.",
    )


def _misshapen(
    name: str,
    path: str,
    found: tuple[int, ...],
    expected: tuple[int, ...],
    rank_axis: int | None,
) -> AdapterError:
    message = f"The tensor {name!r} has shape {list(found)}; {list(expected)} is needed"
    if rank_axis is not None and len(found) == len(expected):
        others = [i for i in range(len(expected)) if i != rank_axis]
        if all(found[i] == expected[i] for i in others):
            return InvalidAdapter(
                f"{message}: the config gives this module rank {expected[rank_axis]}.",
                field=name,
                fix=_OTHER_CONFIG,
            )
    return IncompatibleAdapter(
        f"{message}: the base model's {path!r} has another shape.",
        field=name,
        fix="Upload an adapter that was trained on the served base model.",
    )


def _left_over(name: str, path: str, part: Part) -> InvalidAdapter:
    if part in _ASKED_BY:
        what, key = _ASKED_BY[part]
        return InvalidAdapter(
            f"The tensor {name!r} is {what}, which the config's {key} does not ask for.",
            field=name,
            fix=_OTHER_CONFIG,
        )
    if part is Part.PARAMETER:
        return InvalidAdapter(
            f"The tensor {name!r} replaces {path!r} of the base model, "
            "which neither modules_to_save nor bias asks for.",
            field=name,
            fix=_OTHER_CONFIG,
        )
    if part in _WRAPPED:
        return InvalidAdapter(
            f"The tensor {name!r} is a copy of {path!r}, whose module neither modules_to_save "
            "nor trainable_token_indices names.",
            field=name,
            fix=_OTHER_CONFIG,
        )
    return InvalidAdapter(
        f"The tensor {name!r} is for a module that target_modules does not match "
        "in this base model.",
        field=name,
        fix=_OTHER_CONFIG,
    )
