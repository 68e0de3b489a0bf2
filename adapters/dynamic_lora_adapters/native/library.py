"""Compiling and loading the C++ sources."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
# GCC first: its OpenMP runtime is the one that PyTorch's wheels bring.
_COMPILERS = ("g++", "c++", "clang++")
# Sums may be contracted to fused multiply-adds, but never reordered by the compiler, and NaN is to
# be told from numbers: some compilers do otherwise unless told not to. That says something of
# contractions too, so that these come behind it. Functions that begin at cache lines take as long
# whatever lies before them: packing a weight varied by a tenth, products by a fiftieth.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-std=c++17", "-falign-functions=64"),
    *("-fno-fast-math", "-ffp-contract=fast"),
)
# C compilers understand C++ sources, but link what these need only if told to.
_C_COMPILER = re.compile(r"(.*-)?(cc|gcc|clang)(-\d+)?")
_CPP_RUNTIME = "-lstdc++"
_TIMEOUT_S = 300
# Linux gives a process the matrix unit of an x86 processor (AMX) when it asks for it.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18
_NO_MATRIX_UNIT = "-DDYNAMIC_LORA_NO_MATRIX_UNIT"


class NativeUnavailable(Exception):
    """The native kernels cannot be had on this machine; the text says why."""


def load_library(name: str) -> ctypes.CDLL:
    """The library made from `native/<name>.cpp`, compiled at its first use on this machine.

    The result is kept in the user's cache folder, by the content of source,
    compiler and processor. Raises NativeUnavailable if there is no compiler,
    it fails, or the result would bring a second OpenMP runtime along: for the
    rest of the process, for nothing is tried twice.
    """
    found = attempt(name)
    if isinstance(found, str):
        raise NativeUnavailable(found)
    return found


@cache
def attempt(name: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return _load(name)
    except NativeUnavailable as reason:
        _warn(str(reason))
        return str(reason)


@cache
def _warn(reason: str) -> None:
    """Once for all libraries that lack the same."""
    logger.warning("Without the project's C++ serving is slower: %s", reason)


def allocating(library: ctypes.CDLL, name: str, argtypes: Sequence[Any]) -> Callable[..., None]:
    """A function of a library that returns what `room.h` calls Memory's status.

    A call raises MemoryError where there was too little: what it was to write is undefined then.
    """
    function = getattr(library, name)
    function.argtypes = argtypes
    function.restype = ctypes.c_int64
    function.errcheck = _raise_without_memory
    declared: Callable[..., None] = function
    return declared


def _raise_without_memory(status: int, function: Any, _arguments: object) -> None:
    if status:
        raise MemoryError(f"no memory is left for what {function.__name__} keeps while it runs")


def _load(name: str) -> ctypes.CDLL:
    compiler = _compiler()
    flags = _flags()
    library = _library_path(name, compiler, flags)
    if not library.is_file():
        _compile(compiler, flags, _SOURCES / f"{name}.cpp", library)
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:  # cut short as a machine went down, or of one that has another libc
        logger.warning("%s cannot be loaded and is made anew: %s", library, error)
        _compile(compiler, flags, _SOURCES / f"{name}.cpp", library)
        loaded = _load_made(library)
    _refuse_second_runtime()
    return loaded


def _load_made(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"{library} cannot be loaded: {error}") from error


def _flags() -> tuple[str, ...]:
    return _FLAGS if has_matrix_unit() else (*_FLAGS, _NO_MATRIX_UNIT)


@cache
def has_matrix_unit() -> bool:
    """Whether this process may use a matrix unit of the processor (AMX); asks the system for it."""
    if "amx_tile" not in processor():
        return False
    arguments = map(ctypes.c_long, (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA))
    if ctypes.CDLL(None).syscall(*arguments) == 0:
        return True
    logger.info("The system does not let this process use the processor's matrix unit (AMX)")
    return False


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        if found := shutil.which(name):
            return found
    looked_for = wanted or ", ".join(_COMPILERS)
    raise NativeUnavailable(f"no C++ compiler was found (looked for {looked_for})")


def sources_digest() -> str:
    """A digest of all C++ sources: what is measured of them holds for these alone."""
    content = hashlib.sha256()
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        content.update(source.read_bytes())
    return content.hexdigest()


def _library_path(name: str, compiler: str, flags: tuple[str, ...]) -> Path:
    content = hashlib.sha256()
    for source in (*sorted(_SOURCES.glob("*.h")), _SOURCES / f"{name}.cpp"):
        content.update(source.read_bytes())
    content.update(" ".join([*flags, _version(compiler), processor()]).encode())
    return user_cache_path("dynamic-lora") / "native" / f"{name}-{content.hexdigest()[:16]}.so"


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} does not tell its version: {error}") from error


def processor() -> str:
    """What `-march=native` depends on: the processor's name and abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # x86 has the first two, ARM the others.
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(telling)}))


def _compile(compiler: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Compile to a temporary file and move it into place, so that no half of one is ever seen."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(made)]
            if _C_COMPILER.fullmatch(Path(compiler).name):
                command.append(_CPP_RUNTIME)
            logger.info("Compiling %s", source.name)
            done = subprocess.run(
                command,
                env={**os.environ, "TMPDIR": folder},  # /tmp may be read-only
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise NativeUnavailable(f"{compiler} failed on {source.name}: {done.stderr[:2000]}")
            with made.open("rb") as file:
                os.fsync(file.fileno())  # or a machine that goes down may leave a part of it
            made.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{source.name} could not be compiled: {error}") from error


def _refuse_second_runtime() -> None:
    """Two OpenMP runtimes in one process would each spin on the processors of the other."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    if len(runtimes) > 1:
        raise NativeUnavailable(f"it needs another OpenMP runtime than torch's: {runtimes}")
