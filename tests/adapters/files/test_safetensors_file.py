import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dynamic_lora_adapters import InvalidAdapter
from dynamic_lora_adapters.files.safetensors_file import (
    WEIGHTS_FILE,
    MappedTensors,
    TensorEntry,
    canonical_json,
    hash_tensors,
    read_header,
)


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4).half()}, tmp_path / WEIGHTS_FILE)
    assert read_header(tmp_path / WEIGHTS_FILE) == {
        "a": TensorEntry("F32", (2, 3), 0, 24),
        "b": TensorEntry("F16", (4,), 24, 32),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_mapped_tensors_are_what_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = {"a": torch.arange(6).reshape(2, 3).to(dtype), "none": torch.zeros(0, 4, dtype=dtype)}
    save_file(saved, tmp_path / WEIGHTS_FILE)
    mapped = MappedTensors(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).unlink()  # as when the adapter is deleted meanwhile
    assert all(torch.equal(mapped.tensor(name), saved[name]) for name in saved)
    assert all(mapped.tensor(name).dtype == dtype for name in saved)


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / WEIGHTS_FILE)
    MappedTensors(tmp_path / WEIGHTS_FILE).tensor("a").zero_()
    assert MappedTensors(tmp_path / WEIGHTS_FILE).tensor("a").tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_is_of_all_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = {"a": torch.full((3, 3), 3.0, dtype=dtype), "b": torch.full((19,), -1.0, dtype=dtype)}
    save_file(saved, tmp_path / WEIGHTS_FILE)
    assert MappedTensors(tmp_path / WEIGHTS_FILE).norm == pytest.approx(10.0)


def test_tensors_of_several_types_have_no_norm(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(4).half()}, tmp_path / WEIGHTS_FILE)
    assert math.isnan(MappedTensors(tmp_path / WEIGHTS_FILE).norm)
    save_file({"a": torch.ones(4, dtype=torch.int64)}, tmp_path / WEIGHTS_FILE)
    assert math.isnan(MappedTensors(tmp_path / WEIGHTS_FILE).norm)


@pytest.mark.parametrize("padding", range(4))
def test_tensors_that_lie_at_odd_places_are_read(padding: int, tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 8, shape=(2,))}).encode() + b" " * padding
    write_file(tmp_path, header, struct.pack("<2f", 1.5, -2.0))
    assert MappedTensors(tmp_path / WEIGHTS_FILE).tensor("a").tolist() == [1.5, -2.0]


def test_the_hash_is_of_names_shapes_and_bytes(tmp_path: Path) -> None:
    def digest(**tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / WEIGHTS_FILE)
        found = hashlib.sha256()
        hash_tensors(tmp_path / WEIGHTS_FILE, found)
        return found.hexdigest()

    assert digest(a=torch.ones(4), b=torch.zeros(2)) == digest(b=torch.zeros(2), a=torch.ones(4))
    others = [
        digest(a=torch.ones(4)),
        digest(b=torch.ones(4)),
        digest(a=torch.ones(2, 2)),
        digest(a=torch.ones(4).half()),
        digest(a=torch.zeros(4)),
    ]
    assert len(set(others)) == len(others)


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": [2]}) == canonical_json({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def write_file(folder: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start: Any, stop: Any, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "its header is not JSON"),
        (b"[]", "its header is no JSON object"),
        (b"[" * 100_000, "its header is not JSON"),
        (b'{"a": {}, "b": {}, "a": {}}', "in its header the key 'a' appears twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "the key 'dtype' appears twice"),
        ({"a": 1}, "a tensor that cannot be"),
        ({"a": {"dtype": "F32"}}, "a tensor that cannot be"),
        ({"a": entry(0, 4, shape=[-1])}, "a tensor that cannot be"),
        ({"a": entry(0, 4, shape=[1] * 9)}, "a tensor that cannot be"),
        ({"a": entry(0, "4")}, "a tensor that cannot be"),
        ({"a": entry(0, True)}, "a tensor that cannot be"),
        ({"a": entry(0, 8)}, "the file has"),
        ({"a": entry(1, 4)}, "the data of tensor 'a' overlaps or leaves a gap"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "the data of tensor 'b' overlaps"),
        ({}, "the file has"),
        ({"a": entry(0, 4, shape=(2,))}, "the data of tensor 'a' is not what its shape needs"),
        ({"a": entry(0, 4, dtype="I64")}, "the data of tensor 'a' is not what its shape needs"),
        ({"a": entry(0, 4, shape=(1 << 70,))}, "the data of tensor 'a' is not what its shape"),
    ],
)
def test_lying_headers_are_refused(header: Any, message: str, tmp_path: Path) -> None:
    write_file(tmp_path, header, b"\0" * 4)
    with pytest.raises(InvalidAdapter, match=message) as caught:
        read_header(tmp_path / WEIGHTS_FILE)
    assert caught.value.field == WEIGHTS_FILE


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(InvalidAdapter, match="its header claims 1099511627776 bytes"):
        read_header(tmp_path / WEIGHTS_FILE)
