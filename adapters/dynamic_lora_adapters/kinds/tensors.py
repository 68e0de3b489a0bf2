"""The tensors of an adapter's file, read and held against what the kind needs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.weights import WEIGHTS_FILE, read_header

if TYPE_CHECKING:
    import torch

_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I32", "I64")
_FIX = "Upload the adapter_config.json that was saved with these weights."

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name to shape."""


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in the adapter's file, without the data.

    Raises `InvalidAdapter` for a file that is no whole safetensors file.
    """
    return {name: entry.shape for name, entry in read_header(folder / WEIGHTS_FILE).items()}


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raise `InvalidAdapter` for a tensor that is missing, is one too many or has another shape."""
    for name in sorted(expected):
        if name not in found:
            raise InvalidAdapter(
                f"The config needs the tensor {name!r}, which is missing.", field=name, fix=_FIX
            )
    for name in sorted(found):
        if name not in expected:
            raise InvalidAdapter(
                f"The tensor {name!r} belongs to nothing that the config adapts in this base "
                "model.",
                field=name,
                fix=_FIX,
            )
        if found[name] != expected[name]:
            raise InvalidAdapter(
                f"The tensor {name!r} has shape {list(found[name])}; the config and this base "
                f"model need {list(expected[name])}.",
                field=name,
                fix=_FIX,
            )


def read_tensors(
    folder: Path, expected: Shapes, integers: frozenset[str] = frozenset()
) -> "dict[str, torch.Tensor]":
    """Read exactly the tensors in `expected`, floating-point ones as finite fp32.

    Those named in `integers` hold positions and keep their type. Raises
    `InvalidAdapter` naming the tensor at fault.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    header = read_header(path)
    check_shapes({name: entry.shape for name, entry in header.items()}, expected)
    for name in sorted(expected):
        allowed = _INTEGERS if name in integers else _FLOATS
        if header[name].dtype not in allowed:
            raise InvalidAdapter(
                f"The tensor {name!r} has dtype {header[name].dtype}; {', '.join(allowed)} are "
                "read.",
                field=name,
            )
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: _checked(name, stream.get_tensor(name)) for name in sorted(expected)}
    except SafetensorError as error:
        raise InvalidAdapter(
            f"{path.name} is not a whole safetensors file: {error}.", field=path.name
        ) from None


def num_values(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def check_finite(name: str, tensor: "torch.Tensor") -> None:
    """Raise `InvalidAdapter` if the tensor holds NaN or infinite values."""
    import torch

    if not bool(torch.isfinite(tensor).all()):
        raise InvalidAdapter(
            f"The tensor {name!r} holds NaN or infinite values.",
            field=name,
            fix="The training diverged: train again with a lower learning rate.",
        )


def _checked(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    if not tensor.is_floating_point():
        return tensor
    check_finite(name, tensor)
    return tensor.to(torch.float32).contiguous()
