"""How long requests take lately, for Retry-After."""

import math
from dataclasses import dataclass

_LONGEST_PAUSE = 60


@dataclass(slots=True)
class Pace:
    """A running mean, in seconds."""

    seconds: float = 1.0

    def record(self, seconds: float) -> None:
        """Count one that has been answered."""
        self.seconds += 0.1 * (seconds - self.seconds)

    def retry_after(self, rounds: float) -> int:
        """Seconds until so many have been answered one after the other, a minute at most."""
        return min(_LONGEST_PAUSE, max(1, math.ceil(self.seconds * rounds)))
