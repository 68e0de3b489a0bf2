"""Chat templates that took too much, and are not rendered again for a while.

Each such rendering costs a core for seconds; without a pause, requests for one adapter would leave
everybody else's chats waiting. What counts is what a template takes of the server's own small
conversations: of a client's, a sound one may take too much, too, and nobody is to switch off an
adapter for all others.
"""

import math
import time
from collections.abc import Callable

PAUSE_SECONDS = 60.0
_MOST_KEPT = 64


class StoppedTemplates:
    """Until when, by `clock`, each is left alone. Of too many the oldest is forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def add(self, template: str) -> None:
        """Leave it alone from now on."""
        self._until.pop(template, None)
        self._until[template] = self._clock() + PAUSE_SECONDS
        if len(self._until) > _MOST_KEPT:
            self._until.pop(next(iter(self._until)), None)  # another thread may be faster

    def seconds_left(self, template: str) -> int:
        """For how long it is still left alone, rounded up; 0: it may be rendered."""
        return max(0, math.ceil(self._until.get(template, 0.0) - self._clock()))
