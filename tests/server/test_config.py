"""Options of the server."""

from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_server.config import ServerConfig, parse_bytes
from dynamic_lora_server.errors import InvalidParameter


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 2**20), ("2GiB", 2**31), ("500 MB", 5 * 10**8), ("1.5kib", 1536), ("3b", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 XB", "-1", "2GiB4", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="not a number of bytes"):
        parse_bytes(text)


def test_the_defaults_are_valid() -> None:
    assert ServerConfig().port == 8000


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"host": ""}, "host must not be empty"),
        ({"port": 65536}, "port must lie between 0 and 65535"),
        ({"max_upload_bytes": 0}, "max_upload_bytes must be at least 1"),
        ({"max_hub_bytes": 2**20}, "max_hub_bytes must be at least max_upload_bytes"),
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"max_waiting": -1}, "max_waiting must be 0 or more"),
        ({"kv_memory": 0}, "kv_memory must be at least 1"),
        ({"prefix_cache_memory": -1}, "prefix_cache_memory must be 0 or more"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"speculate": -1}, "speculate must lie between 0 and 7"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16"),
        ({"kv_dtype": "fp8"}, "kv_dtype must be one of auto, float32, bfloat16, float16"),
        ({"quantize": "q4"}, "quantize must be one of none, bf16, int8, w8a8"),
        (
            {"base_product": "plain", "quantize": "bf16"},
            "base_product must be auto with quantize",
        ),
        ({"dtype": "bfloat16", "quantize": "int8"}, "dtype must be float32 with quantize"),
        ({"native": False, "quantize": "bf16"}, "native must stay on: these products are in C"),
        ({"native": False, "base_product": "native"}, "native must stay on"),
        ({"restore": "subtract", "quantize": "bf16"}, "restore must be copy with packed weights"),
        ({"restore": "subtract", "base_product": "packed"}, "restore must be copy"),
        ({"api_keys": ("two words",)}, "api_keys must be of visible ASCII characters"),
        ({"admin_keys": ("",)}, "admin_keys must be of visible ASCII characters"),
        ({"fetch_from_hub": ("one,two",)}, "fetch_from_hub names 'one,two'; give organisations"),
        ({"fetch_from_hub": ("one/two",)}, "fetch_from_hub names 'one/two'"),
        ({"allowed_origins": ("example.org",)}, "allowed_origins names 'example.org'"),
        ({"allowed_origins": ("https://example.org/a",)}, "with no path"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"tool_call_format": "xml"}, "tool_call_format must be one of auto, hermes"),
        ({"log_level": "loud"}, "log_level must be one of"),
        (
            {"record_trace": Path("/")},
            "record_trace names /, which is no file",
        ),
        (
            {"record_trace": Path("no-such-folder/trace.jsonl")},
            "record_trace is to lie in no-such-folder, which is no folder",
        ),
        ({"adapter_roots": (Path("no-such-folder"),)}, "adapter_roots names no-such-folder"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(InvalidParameter, match=rule) as caught:
        ServerConfig(**options)
    assert caught.value.field == next(iter(options))
