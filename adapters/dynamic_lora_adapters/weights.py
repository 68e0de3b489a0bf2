"""Reading a LoRA's factors, with every tensor checked against config and base.

Only safetensors is read. PEFT writes one pair of tensors for each adapted
module, `base_model.model.<path>.lora_A.weight` of shape [rank, in_features] and
`...lora_B.weight` of shape [out_features, rank]; older releases put the
adapter's name (`default`) before `weight`.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dynamic_lora_adapters.errors import (
    AdapterError,
    IncompatibleAdapter,
    InvalidAdapter,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.geometry import BaseGeometry, LinearShape
from dynamic_lora_adapters.spec import LoraSpec
from dynamic_lora_adapters.targets import Target, find_targets

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_HEADER_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_DTYPES = ("F32", "F16", "BF16")
_PREFIX = "base_model.model."
_FACTOR_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Tensors that PEFT writes for features that are not served, by a part of their name.
_FEATURE_KEYS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_": "an embedding adapter",
    "lora_B.bias": "a LoRA bias",
    "lora_B.default.bias": "a LoRA bias",
    "token_adapter": "trained token embeddings",
    "modules_to_save": "a replaced layer",
}


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One module's delta, `dW = b @ a`, in fp32 on the CPU.

    `a` is [rank, in_features], `b` is [out_features, rank]; `scaling` is
    already a factor of `b`, multiplied once in fp32.
    """

    a: "torch.Tensor"
    b: "torch.Tensor"
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: its dtype, shape and place after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_adapter(folder: Path, spec: LoraSpec, geometry: BaseGeometry) -> dict[str, LoraFactors]:
    """Read and check every factor of the adapter in `folder`, by module path.

    Raises `InvalidAdapter` for a broken file, a missing, extra, misshapen or
    non-finite tensor (naming it), `UnsupportedAdapter` for tensors of features
    that are not served, `IncompatibleAdapter` for shapes of another base model.
    """
    targets = find_targets(spec, geometry)
    path = folder / WEIGHTS_FILE
    keys = _pair_keys(read_header(path), targets)
    return _read_factors(path, targets, keys, geometry)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors header: tensor names to entries, without the data.

    Sizes and offsets are checked against each other and the file's length:
    entries must cover the data exactly, without gap or overlap. Raises
    `InvalidAdapter`.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InvalidAdapter(
            f"{path.name} is missing.",
            field=path.name,
            fix="Save the adapter with save_pretrained(path, safe_serialization=True).",
        ) from None
    with path.open("rb") as stream:
        header, data_start = _read_header_json(stream, size, path.name)
    header.pop("__metadata__", None)
    try:
        entries = {name: _entry(value) for name, value in header.items()}
    except (KeyError, TypeError, ValueError):
        raise _broken(path.name, "its header describes a tensor that cannot be") from None
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position or entry.stop < entry.start:
            raise _broken(path.name, f"the data of tensor {name!r} overlaps or leaves a gap")
        position = entry.stop
    if data_start + position != size:
        raise _broken(
            path.name, f"its header promises {data_start + position} bytes, the file has {size}"
        )
    return entries


def content_digest(spec: LoraSpec, weights: Path, card: Mapping[str, Any] | None) -> str:
    """SHA-256, in hex, of everything that changes the adapter's answers.

    That is the canonical config, all tensors in order of name (dtype, shape
    and bytes), and the task card, whose template and defaults shape the prompt.
    File layout, metadata and the order of keys do not count.
    """
    digest = hashlib.sha256()
    for part in (spec.canonical(), card):
        digest.update(_canonical_json(part))
    entries = read_header(weights)
    with weights.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        for name in sorted(entries):
            entry = entries[name]
            digest.update(_canonical_json([name, entry.dtype, entry.shape]))
            stream.seek(8 + header_size + entry.start)
            left = entry.stop - entry.start
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise _broken(weights.name, "it ends early")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _canonical_json(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # The newline ends a part: no two lists of parts share their bytes.
    return text.encode() + b"\n"


def _read_header_json(stream: BinaryIO, size: int, name: str) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise _broken(name, f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise _broken(name, f"its header claims {length} bytes")
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        raise _broken(name, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(name, "its header is no JSON object")
    return header, 8 + length


def _entry(value: Mapping[str, Any]) -> TensorEntry:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("sizes must be integers from 0")
    return TensorEntry(str(value["dtype"]), shape, start, stop)


def _broken(name: str, reason: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"{name} is not a whole safetensors file: {reason}.",
        field=name,
        fix="Save the adapter again and upload the complete file.",
    )


def _pair_keys(
    entries: Mapping[str, TensorEntry], targets: Iterable[Target]
) -> dict[tuple[str, str], str]:
    """Map (module path, "A" or "B") to the tensor that holds it; exactly the targets' pairs."""
    wanted = {target.path for target in targets}
    keys: dict[tuple[str, str], str] = {}
    for name, entry in entries.items():
        match = _FACTOR_KEY.fullmatch(name)
        if match is None:
            raise _unknown_tensor(name)
        path, side = match.groups()
        if path not in wanted:
            raise InvalidAdapter(
                f"The tensor {name!r} is for a module that target_modules does not match "
                "in this base model.",
                field=name,
                fix="Upload the adapter_config.json that was saved with these weights.",
            )
        if (path, side) in keys:
            raise InvalidAdapter(
                f"{keys[path, side]!r} and {name!r} are the same factor.", field=name
            )
        if entry.dtype not in _DTYPES:
            raise InvalidAdapter(
                f"The tensor {name!r} has dtype {entry.dtype}; {', '.join(_DTYPES)} are read.",
                field=name,
            )
        keys[path, side] = name
    for path in sorted(wanted):
        for side in "AB":
            if (path, side) not in keys:
                missing = f"{_PREFIX}{path}.lora_{side}.weight"
                raise InvalidAdapter(
                    f"The config targets {path!r} but the tensor {missing!r} is missing.",
                    field=missing,
                    fix="Upload the adapter_config.json that was saved with these weights.",
                )
    return keys


def _unknown_tensor(name: str) -> AdapterError:
    for part, feature in _FEATURE_KEYS.items():
        if part in name:
            return UnsupportedAdapter(
                f"The tensor {name!r} is {feature}, which is not served.", field=name
            )
    if name.startswith(_PREFIX) and ".lora_" not in name:
        return UnsupportedAdapter(
            f"The tensor {name!r} replaces a weight of the base model, which is not served.",
            field=name,
            fix="Save with save_pretrained(path, save_embedding_layers=False).",
        )
    return InvalidAdapter(
        f"The tensor {name!r} is no LoRA factor.",
        field=name,
        fix=f"PEFT names them '{_PREFIX}<module>.lora_A.weight' and '...lora_B.weight'.",
    )


def _read_factors(
    path: Path,
    targets: Iterable[Target],
    keys: Mapping[tuple[str, str], str],
    geometry: BaseGeometry,
) -> dict[str, LoraFactors]:
    from safetensors import SafetensorError, safe_open

    factors = {}
    try:
        with safe_open(path, framework="pt") as stream:
            for target in targets:
                name_a, name_b = keys[target.path, "A"], keys[target.path, "B"]
                a, b = stream.get_tensor(name_a), stream.get_tensor(name_b)
                shape = geometry.linears[target.path]
                _check_shapes(target, shape, (name_a, tuple(a.shape)), (name_b, tuple(b.shape)))
                factors[target.path] = _fold(target, name_a, a, name_b, b)
    except SafetensorError as error:
        raise _broken(path.name, str(error)) from None
    return factors


def _check_shapes(
    target: Target,
    shape: LinearShape,
    a: tuple[str, tuple[int, ...]],
    b: tuple[str, tuple[int, ...]],
) -> None:
    for (name, found), rank_axis, expected in (
        (a, 0, (target.rank, shape.in_features)),
        (b, 1, (shape.out_features, target.rank)),
    ):
        if found == expected:
            continue
        message = f"The tensor {name!r} has shape {list(found)}; {list(expected)} is needed"
        if len(found) == 2 and found[1 - rank_axis] == expected[1 - rank_axis]:
            raise InvalidAdapter(
                f"{message}: the config gives this module rank {target.rank}.",
                field=name,
                fix="Upload the adapter_config.json that was saved with these weights.",
            )
        raise IncompatibleAdapter(
            f"{message}: the base model's {target.path!r} takes {shape.in_features} features "
            f"to {shape.out_features}.",
            field=name,
            fix="Upload an adapter that was trained on the served base model.",
        )


def _fold(
    target: Target, name_a: str, a: "torch.Tensor", name_b: str, b: "torch.Tensor"
) -> LoraFactors:
    import torch

    a = a.to(torch.float32)
    scaled = b.to(torch.float32) * target.scaling
    for name, tensor in ((name_a, a), (name_b, scaled)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidAdapter(
                f"The tensor {name!r} holds NaN or infinite values.",
                field=name,
                fix="The training diverged: train again with a lower learning rate.",
            )
    return LoraFactors(a.contiguous(), scaled.contiguous(), target.rank, target.scaling)
