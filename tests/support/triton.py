"""Triton's kernels in Triton's interpreter, which needs no GPU."""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

# Of one program on the smallest GPUs that multiply bfloat16 (compute capability 8.6).
SHARED_BYTES = 99 * 1024
CAPABILITIES = (80, 90)  # Ampere, Hopper
MODULES = (
    "dynamic_lora_adapters.kernels.triton_segments",
    "dynamic_lora_server.engine.attention.paged_triton",
)


@contextmanager
def interpreted() -> Iterator[None]:
    """The kernels are interpreted while the block lasts; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _reload()
        yield
    # Whether a kernel is interpreted is settled when it is defined.
    _reload()


@contextmanager
def to_be_compiled() -> Iterator[None]:
    """The kernels are not interpreted while the block lasts; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        _reload()
        yield
    _reload()


def _reload() -> None:
    for name in MODULES:
        importlib.reload(importlib.import_module(name))


def compile_for_a_gpu(
    function: Callable[..., None],
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int = CAPABILITIES[0],
    divisible: Collection[str] = (),
) -> str:
    """The PTX of a kernel for a compute capability. Triton brings its own assembler.

    Fails if it takes more shared memory than a small GPU may have.
    `pointers` are the types of what arguments point to; `sign` and `scaling` are float32,
    all others int32. Where pointers and `divisible` numbers are multiples of 16, as tensors' and
    widths of layers are, loads are wide, and pipelined through shared memory.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    kernel = triton.JITFunction(function)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name in ("sign", "scaling") else "i32"
    wide = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in pointers or name in divisible
    }
    source = triton.compiler.ASTSource(kernel, signature, dict(constants), wide)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared <= SHARED_BYTES
    return str(compiled.asm["ptx"])
