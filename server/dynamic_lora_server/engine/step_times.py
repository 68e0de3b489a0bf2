"""How long a step of so many rows takes: as measured at the start, then as steps turn out.

Imports no torch.
"""

from bisect import bisect_left

from dynamic_lora_server.modes.costs import Points

# How fast the pace follows: a virtual machine's clock changes within seconds.
_PACE_FOLLOWS = 0.2
# How fast the shape does, which is the model's and the traffic's.
_SHAPE_FOLLOWS = 0.05
# What a single step may say: one that was held up says nothing about its rows.
_LEAST, _MOST = 0.5, 2.0


class StepTimes:
    """Straight lines between measured points, corrected by every step that is observed.

    Two things are kept apart: the pace of the machine, which scales all times alike and follows
    quickly, and the shape, of which only what lies next to an observed step follows, slowly. So
    times of rows that were not seen lately stay in proportion to the others.
    """

    def __init__(self, points: Points) -> None:
        self._rows = [rows for rows, _ in points]
        self._shape = [seconds for _, seconds in points]
        self._pace = 1.0

    def of(self, num_rows: int) -> float:
        """Seconds of a step; none for no rows."""
        if num_rows <= 0:
            return 0.0
        return self._pace * sum(self._shape[place] * part for place, part in self._parts(num_rows))

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn from a step of so many rows."""
        expected = self.of(num_rows)
        if expected <= 0:
            return
        off = min(max(seconds / expected, _LEAST), _MOST) - 1.0
        self._pace *= 1.0 + _PACE_FOLLOWS * off
        for place, part in self._parts(num_rows):
            # A point that the line only begins at, behind the last one, is left alone.
            self._shape[place] *= 1.0 + _SHAPE_FOLLOWS * off * min(max(part, 0.0), 1.0)

    def _parts(self, num_rows: int) -> list[tuple[int, float]]:
        """The points that a time is made of, and how much of each; level before the first."""
        rows = self._rows
        if num_rows <= rows[0] or len(rows) == 1:
            return [(0, 1.0)]
        place = min(bisect_left(rows, num_rows), len(rows) - 1)
        share = (num_rows - rows[place - 1]) / (rows[place] - rows[place - 1])
        return [(place - 1, 1.0 - share), (place, share)]
