"""C++ for what decides the speed on a CPU, compiled on the machine that runs it.

Nothing here is needed: every caller has torch's own operators to fall back to,
and says at start which of the two it uses.
"""

from dynamic_lora_adapters.native.library import NativeUnavailable, load_library, sources_digest

__all__ = ["NativeUnavailable", "load_library", "sources_digest"]
