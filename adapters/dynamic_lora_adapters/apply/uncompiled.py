"""Functions that torch.compile leaves as they are."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keep a function whose result depends on the running step out of compiled code.

    Compiled code would hold on to what it met when it was made. Elsewhere a call takes
    1 us longer.
    """
    kept: Callable[_P, _R] = torch.compiler.disable(function)
    return kept
