"""What tells one served base model from another: `system_fingerprint` of OpenAI's answers."""

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"})
_NUM_BYTES = 2**20


def fingerprint(folder: Path, conditions: Iterable[str]) -> str:
    """`fp_` and twelve hexadecimal digits of a base model's files and of what else decides.

    Of each file count its name, its size and its last MiB: other weights differ there too, and
    reading all of a large model would take a start's time twice. Raises OSError.
    """
    found = sha256(repr(tuple(conditions)).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES and path.is_file():
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _NUM_BYTES))
                found.update(repr((path.name, size)).encode() + file.read())
    return f"fp_{found.hexdigest()[:12]}"
