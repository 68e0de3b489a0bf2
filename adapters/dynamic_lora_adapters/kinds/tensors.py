"""The tensors of an adapter's file, read and held against what the kind needs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.safetensors_file import (
    READ_DTYPES,
    WEIGHTS_FILE,
    MappedTensors,
    read_header,
)
from dynamic_lora_adapters.lora.checkpoint import check_finite

if TYPE_CHECKING:
    import torch

# PEFT on Windows saves integers as F32.
_INTEGERS = ("I32", "I64", "F32")
# Beyond this a float32 stands for several integers.
_MOST_WHOLE = 1 << 24
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

    Those named in `integers` hold positions and come as integers. Raises
    `InvalidAdapter` naming the tensor at fault.
    """
    stored = MappedTensors(folder / WEIGHTS_FILE)
    header = stored.entries
    check_shapes({name: entry.shape for name, entry in header.items()}, expected)
    for name in sorted(expected):
        allowed = _INTEGERS if name in integers else READ_DTYPES
        if header[name].dtype not in allowed:
            raise InvalidAdapter(
                f"The tensor {name!r} has dtype {header[name].dtype}; {', '.join(allowed)} are "
                "read.",
                field=name,
            )
    return {
        name: (_whole if name in integers else _finite)(name, stored.tensor(name))
        for name in sorted(expected)
    }


def num_values(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def _finite(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    tensor = tensor.to(torch.float32)
    check_finite(name, tensor)
    return tensor.contiguous()


def _whole(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    if not tensor.is_floating_point():
        return tensor
    # NaN and infinities are refused too: they equal no integer.
    whole = tensor.abs() < _MOST_WHOLE
    if not bool(whole.all()) or not tensor.equal(tensor.trunc()):
        raise InvalidAdapter(
            f"The tensor {name!r} holds positions that are not whole numbers.", field=name
        )
    return tensor.to(torch.int64)
