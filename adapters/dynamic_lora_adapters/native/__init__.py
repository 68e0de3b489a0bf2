"""C++ for what decides the speed on a CPU, compiled on the machine that runs it.

Nothing here is needed but for weights that are rounded on request: every other caller has
torch's own operators to fall back to, and the log says at level info why it does.
"""

from dynamic_lora_adapters.native.library import (
    NativeUnavailable,
    allocating,
    has_matrix_unit,
    load_library,
    processor,
    sources_digest,
)

__all__ = [
    "NativeUnavailable",
    "allocating",
    "has_matrix_unit",
    "load_library",
    "processor",
    "sources_digest",
]
