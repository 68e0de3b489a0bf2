"""A safetensors file, read without trusting it."""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.json_file import DuplicateKey, unique_keys

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
READ_DTYPES = ("F64", "F32", "F16", "BF16")

_MAX_HEADER_BYTES = 16 << 20
# Far more than any layer has: the product of a million sizes takes minutes.
_MAX_DIMENSIONS = 8
_CHUNK_BYTES = 1 << 20
_READ_AHEAD_BYTES = 128 << 10
# What torch calls the types that are read, and their sizes in bytes.
_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: its dtype, shape and place after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors header: tensor names to entries, without the data.

    Sizes and offsets are checked against each other and the file's length:
    entries must cover the data exactly, without gap or overlap. A name that
    comes twice would mean one tensor here and another to the next reader.
    Raises `InvalidAdapter`.
    """
    with _opened(path) as (stream, size):
        return _read_layout(stream, size, path.name)[0]


class MappedTensors:
    """The tensors of a file, mapped into memory: a page is read when it is first touched.

    Tensors stay valid when the file is removed; it must not be written to. Raises
    `InvalidAdapter` for a broken file, OSError where it cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        import torch

        with _opened(path) as (stream, size):
            _ask_for(stream, size)
            self.entries, self._data_start = _read_layout(stream, size, path.name)
            mapping = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._flat: dict[str, torch.Tensor] = {}

    @cached_property
    def norm(self) -> float:
        """The Euclidean norm of all values, in one pass; NaN where they have several types.

        No value is larger, but for the norm's own rounding.
        """
        import torch

        types = {entry.dtype for entry in self.entries.values()}
        # In single precision, which torch does not narrow doubles to.
        if len(types) != 1 or not types <= {"F32", "F16", "BF16"}:
            return math.nan
        (name,) = types
        if self._data_start % _TYPES[name][1]:
            return math.nan
        values = self._values(name)[self._data_start // _TYPES[name][1] :]
        return float(torch.linalg.vector_norm(values, dtype=torch.float32))

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by its name, in the file's dtype (64, 32 or 16 bits, or integers); no copy."""
        import torch

        entry = self.entries[name]
        torch_name, num_bytes = _TYPES[entry.dtype]
        start, stop = self._data_start + entry.start, self._data_start + entry.stop
        if start % num_bytes:
            dtype: torch.dtype = getattr(torch, torch_name)
            return self._bytes[start:stop].clone().view(dtype).view(entry.shape)
        values = self._values(entry.dtype)
        return values[start // num_bytes : stop // num_bytes].view(entry.shape)

    def _values(self, name: str) -> "torch.Tensor":
        """The whole file as numbers of a type."""
        import torch

        if name not in self._flat:
            torch_name, num_bytes = _TYPES[name]
            whole = len(self._bytes) // num_bytes * num_bytes
            self._flat[name] = self._bytes[:whole].view(getattr(torch, torch_name))
        return self._flat[name]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size in bytes; raises `InvalidAdapter` if there is none."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise InvalidAdapter(
            f"{path.name} is missing.",
            field=path.name,
            fix="Save the adapter with save_pretrained(path, safe_serialization=True).",
        ) from None
    with stream:
        yield stream, os.fstat(stream.fileno()).st_size


def _ask_for(stream: BinaryIO, size: int) -> None:
    """Have the file read ahead as a whole, not in the pieces that page faults would ask for."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        # The system cuts longer wishes short without a word.
        for start in range(0, size, _READ_AHEAD_BYTES):
            os.posix_fadvise(stream.fileno(), start, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def _read_layout(stream: BinaryIO, size: int, name: str) -> tuple[dict[str, TensorEntry], int]:
    """The entries, and where the data begins."""
    header, data_start = _read_header_json(stream, size, name)
    header.pop("__metadata__", None)
    try:
        entries = {key: _entry(value) for key, value in header.items()}
    except (KeyError, TypeError, ValueError):
        raise broken_file(name, "its header describes a tensor that cannot be") from None
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position or entry.stop < entry.start:
            raise broken_file(name, f"the data of tensor {key!r} overlaps or leaves a gap")
        position = entry.stop
    if data_start + position != size:
        raise broken_file(
            name, f"its header promises {data_start + position} bytes, the file has {size}"
        )
    for key, entry in entries.items():
        if not _fits(entry):
            raise broken_file(name, f"the data of tensor {key!r} is not what its shape needs")
    return entries, data_start


def hash_tensors(path: Path, digest: Any) -> None:
    """Feed all tensors to a hashlib `digest`, in order of name: name, dtype, shape and bytes."""
    entries = read_header(path)
    with path.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        for name in sorted(entries):
            entry = entries[name]
            digest.update(canonical_json([name, entry.dtype, entry.shape]))
            stream.seek(8 + header_size + entry.start)
            left = entry.stop - entry.start
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise broken_file(path.name, "it ends early")
                digest.update(chunk)
                left -= len(chunk)


def canonical_json(value: object) -> bytes:
    """One spelling of a JSON value, as a line: no two lists of lines share their bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def broken_file(name: str, reason: str) -> InvalidAdapter:
    """The error for a file that is damaged or cut off."""
    return InvalidAdapter(
        f"{name} is not a whole safetensors file: {reason}.",
        field=name,
        fix="Save the adapter again and upload the complete file.",
    )


def _read_header_json(stream: BinaryIO, size: int, name: str) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise broken_file(name, f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise broken_file(name, f"its header claims {length} bytes")
    try:
        header = json.loads(stream.read(length), object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise broken_file(name, f"in its header {error}") from None
    except (ValueError, RecursionError):
        raise broken_file(name, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise broken_file(name, "its header is no JSON object")
    return header, 8 + length


def _fits(entry: TensorEntry) -> bool:
    """Whether shape and bytes agree, as far as the type is known here."""
    if entry.dtype not in _TYPES:
        return True
    _, num_bytes = _TYPES[entry.dtype]
    return math.prod(entry.shape) * num_bytes == entry.stop - entry.start


def _entry(value: Mapping[str, Any]) -> TensorEntry:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("sizes must be integers from 0")
    return TensorEntry(str(value["dtype"]), shape, start, stop)
