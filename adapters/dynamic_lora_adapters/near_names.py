"""Names that somebody may have meant."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from heapq import nsmallest

# Comparing two names takes some 50 µs, and it is done while others wait.
_MOST_COMPARED = 200
_MOST_SHOWN = 3


def near_names(name: str, known: Iterable[str]) -> Sequence[str]:
    """Up to three of the `known` names that are like `name`, the nearest first, in any case.

    Of many, those alone are looked at that begin alike, or else are about as long. A name more
    than twice as long as all of them is like none, and is not looked at: it may be a whole body.
    """
    names = list(known)
    if len(name) > 2 * max(map(len, names), default=0):
        return ()

    def unlike(other: str) -> tuple[bool, int, str]:
        return other[:1].lower() != name[:1].lower(), abs(len(other) - len(name)), other

    spelt: dict[str, list[str]] = defaultdict(list)
    for other in nsmallest(_MOST_COMPARED, names, key=unlike):
        spelt[other.lower()].append(other)
    near = difflib.get_close_matches(name.lower(), spelt, _MOST_SHOWN)
    return [other for match in near for other in spelt[match]][:_MOST_SHOWN]
