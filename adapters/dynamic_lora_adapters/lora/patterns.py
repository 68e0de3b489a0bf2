"""Regular expressions of an adapter, proved quick to match before they are matched here.

One can backtrack for hours while it holds the interpreter's lock. Those from outside are
first run in a process that can be killed.
"""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from dynamic_lora_adapters.errors import InvalidAdapter

_PROBE_SECONDS = 10.0
_PROBE = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name), re.fullmatch(pattern, name)
"""
# The shapes in which PEFT uses patterns: whole paths, ends of paths, layer segments, subtrees.
_SHAPES = ("{}", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r"(^|.*\.){}($|\..*)")
# A path, anchored and escaped as PEFT writes it: nothing in it can be tried in two ways.
_PLAIN_NAME = re.compile(r"\^?(?:\w|\.|\\\.)*\$?")
# Digests of what was proved, so that reading an adapter again starts no process.
_proved: set[str] = set()
_MAX_PROVED = 4096


def prove_fast(patterns: Iterable[tuple[str, str]], names: Sequence[str]) -> None:
    """Raise `InvalidAdapter` for patterns that take unreasonably long on any of `names`.

    `patterns` come with the config's key that each is of.
    """
    doubtful = [(key, one) for key, one in patterns if not _PLAIN_NAME.fullmatch(one)]
    if not doubtful:
        return
    probes = [shape.replace("{}", pattern) for _, pattern in doubtful for shape in _SHAPES]
    work = json.dumps([[probe for probe in probes if _compiles(probe)], names]).encode()
    digest = hashlib.sha256(work).hexdigest()
    if digest in _proved:
        return
    try:
        # Not checked: a pattern that fails there fails here too, with its own error.
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE],
            input=work,
            timeout=_PROBE_SECONDS,
            capture_output=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        keys = ", ".join(sorted({key for key, _ in doubtful}))
        raise InvalidAdapter(
            f"A regular expression in {keys} takes over {_PROBE_SECONDS:.0f} seconds to match.",
            field=keys,
            fix="List the module names instead.",
        ) from None
    if len(_proved) >= _MAX_PROVED:
        _proved.clear()
    _proved.add(digest)


def _compiles(pattern: str) -> bool:
    # Inline flags, for one, are legal only at the start of a pattern.
    with contextlib.suppress(re.error):
        re.compile(pattern)
        return True
    return False
