"""How one server is set up: every option of `dynamic-lora serve`, checked. Imports no torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_dir

from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.tools.notation import NOTATIONS

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
MODES = ("auto", "bypass", "merged")
RESTORES = ("copy", "subtract")
QUANTIZATIONS = ("none", "bf16", "int8", "w8a8")
BASE_PRODUCTS = ("auto", "plain", "packed", "native")
TOOL_CALL_FORMATS = ("auto", *NOTATIONS)
LOG_LEVELS = ("debug", "info", "warning", "error")

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_KEY = re.compile(r"[!-~]+")
_ORGANISATION = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._-]*")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def default_home() -> Path:
    """The user's data folder for adapters and their index."""
    return Path(user_data_dir("dynamic-lora"))


def parse_bytes(text: str) -> int:
    """Bytes from text such as `2GiB`, `500 MB` or `1048576`.

    Raises InvalidParameter that names the units.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise InvalidParameter(
            f"{text!r} is not a number of bytes.",
            fix="Write a number and a unit: B, kB, MB, GB, KiB, MiB or GiB, for example 2GiB.",
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All options of one server. Memory is in bytes; None leaves a size to the engine.

    `model` is a folder or hub id, None the embedded default; `served_model_names` are further
    names of it, the first of which answers and lists use. `adapter_roots`
    are the folders below which `POST /adapters` may read a `source` path; with
    none of them, a path on the server's disk is refused. `max_body_bytes`
    bounds every request except uploads, which `max_upload_bytes` bounds. An adapter of one of the
    organisations `fetch_from_hub`, "*" for all, is fetched from the Hub when a request names its
    id; the weights of those take up to `max_hub_bytes` together, None for no bound. With
    `api_keys` all
    routes but those of probes and of the documentation want one of them, with `admin_keys` what
    changes adapters and compositions wants one of those. Pages of the `allowed_origins`, as
    "https://example.org" or "*" for all, may call the server from a browser.
    `prefix_cache_memory` is the part of `kv_memory` that may keep beginnings of
    prompts, 0 for none. `kv_dtype` is what keys and values are kept in: "auto" is the model's
    dtype, or bfloat16 with `quantize`.
    `database_url` replaces the SQLite index in `home`. `grace_seconds` is how long requests may
    run on when the server is to stop, `keep_alive_seconds` how long a connection
    without a request is kept: longer than proxies keep theirs. `base_product` says what
    multiplies by the base's weights, "auto" what measures fastest;
    without `native` nothing runs in the project's own C++. With `compile` torch compiles the
    decoder layers for CUDA graphs; without `overlap` a GPU's steps wait for one another's
    answers. Up to `speculate` tokens of a sequence are drafted in a step, on a CPU; None means as
    many as can be there, and none on a GPU. `quantize` rounds the base's weights to "bf16" or
    "int8", or with "w8a8" these and the inputs of its layers to eight bits, and adapters' factors
    with them.
    `mode` says whether adapters are merged into the weights, `restore` how the base comes back
    afterwards.
    `tool_call_format` is the notation in which models write calls where their chat template does
    not tell it.
    `record_trace` names a file for who asked for what and when, without any text; where there is
    a trace already, its name gets a number.

    Raises InvalidParameter, naming the field.
    """

    model: str | None = None
    served_model_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    home: Path = field(default_factory=default_home)
    database_url: str | None = None
    adapter_roots: tuple[Path, ...] = ()
    fetch_from_hub: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    max_upload_bytes: int = 2 * 2**30
    max_body_bytes: int = 8 * 2**20
    max_hub_bytes: int | None = None
    adapter_memory: int | None = None
    kv_memory: int | None = None
    kv_dtype: str = "auto"
    prefix_cache_memory: int | None = None
    max_running: int = 64
    max_waiting: int = 1024
    grace_seconds: int = 10
    keep_alive_seconds: int = 75
    prefill_chunk: int = 512
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    base_product: str = "auto"
    native: bool = True
    compile: bool = False
    overlap: bool = True
    speculate: int | None = None
    quantize: str = "none"
    mode: str = "auto"
    restore: str = "copy"
    tool_call_format: str = "auto"
    record_trace: Path | None = None
    log_level: str = "warning"

    def __post_init__(self) -> None:
        _check("host", bool(self.host), "must not be empty")
        _check("port", 0 <= self.port < 2**16, "must lie between 0 and 65535")
        for name in ("max_upload_bytes", "max_body_bytes", "max_running", "prefill_chunk"):
            _check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("adapter_memory", "kv_memory", "threads"):
            value = getattr(self, name)
            _check(name, value is None or value >= 1, "must be at least 1")
        prefixes = self.prefix_cache_memory
        _check("prefix_cache_memory", prefixes is None or prefixes >= 0, "must be 0 or more")
        drafted = self.speculate or 0
        _check("speculate", 0 <= drafted <= MAX_DRAFT, f"must lie between 0 and {MAX_DRAFT}")
        for name in ("max_waiting", "grace_seconds", "keep_alive_seconds"):
            _check(name, getattr(self, name) >= 0, "must be 0 or more")
        for name, choices in (
            ("dtype", DTYPES),
            ("kv_dtype", DTYPES),
            ("device", DEVICES),
            ("base_product", BASE_PRODUCTS),
            ("quantize", QUANTIZATIONS),
            ("mode", MODES),
            ("restore", RESTORES),
            ("tool_call_format", TOOL_CALL_FORMATS),
            ("log_level", LOG_LEVELS),
        ):
            _check(name, getattr(self, name) in choices, f"must be one of {', '.join(choices)}")
        if self.quantize != "none":
            _check("base_product", self.base_product == "auto", "must be auto with quantize")
            in_float32 = self.dtype in ("auto", "float32")
            _check("dtype", in_float32, "must be float32 with quantize: sums are float32")
        in_cpp = self.quantize != "none" or self.base_product == "native"
        _check("native", self.native or not in_cpp, "must stay on: these products are in C++ alone")
        separate = self.quantize != "none" or self.base_product in ("packed", "native")
        rule = (
            "must be copy with packed weights: the base is in the model's own, and no copy is made"
        )
        _check("restore", self.restore == "copy" or not separate, rule)
        if self.record_trace is not None:
            path, folder = self.record_trace, self.record_trace.parent
            is_file = path.is_file() or not path.exists()
            _check("record_trace", is_file, f"names {path}, which is no file")
            _check("record_trace", folder.is_dir(), f"is to lie in {folder}, which is no folder")
        hub = self.max_hub_bytes
        rule = "must be at least max_upload_bytes, so that each adapter alone fits"
        _check("max_hub_bytes", hub is None or hub >= self.max_upload_bytes, rule)
        self._check_clients()
        for root in self.adapter_roots:
            _check("adapter_roots", root.is_dir(), f"names {root}, which is no folder")

    def _check_clients(self) -> None:
        """What clients call the server by, and what it lets them in by."""
        for name in ("api_keys", "admin_keys"):
            sendable = all(_KEY.fullmatch(key) for key in getattr(self, name))
            _check(name, sendable, "must be of visible ASCII characters, as headers carry them")
        for name in self.fetch_from_hub:
            rule = f"names {name!r}; give organisations of the Hub one by one, or * for all"
            _check("fetch_from_hub", bool(_ORGANISATION.fullmatch(name)), rule)
        for origin in self.allowed_origins:
            rule = f"names {origin!r}; an origin is *, or as https://example.org, with no path"
            _check("allowed_origins", bool(_ORIGIN.fullmatch(origin)), rule)
        names = self.served_model_names
        for name in names:
            rule = f"holds {name!r}; a name is printable and has no spaces"
            _check("served_model_names", _is_model_name(name), rule)
        _check("served_model_names", len(set(names)) == len(names), "must not repeat a name")


def _is_model_name(text: str) -> bool:
    return text != "" and text.isprintable() and " " not in text


def _check(name: str, valid: bool, rule: str) -> None:
    if not valid:
        raise InvalidParameter(f"{name} {rule}.", field=name)
