"""Triton's kernels in Triton's interpreter, which needs no GPU."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

MODULE = "dynamic_lora_adapters.kernels.triton_segments"


@contextmanager
def interpreted() -> Iterator[ModuleType]:
    """The kernels' module, interpreted while the block lasts; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.reload(importlib.import_module(MODULE))
    # Whether a kernel is interpreted is settled when it is defined.
    importlib.reload(importlib.import_module(MODULE))
