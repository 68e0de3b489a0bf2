"""How long a step of so many rows takes: as measured at the start, then as steps turn out.

Imports no torch.
"""

from bisect import bisect_left
from collections.abc import Sequence

from dynamic_lora_server.modes.costs import Points

# How fast the pace follows: a virtual machine's clock changes within seconds.
_PACE_FOLLOWS = 0.2
# How fast the shape does, which is the model's and the traffic's.
_SHAPE_FOLLOWS = 0.05
# What a single step may say: one that was held up says nothing about its rows.
_LEAST, _MOST = 0.5, 2.0


class StepTimes:
    """Straight lines below measured points, corrected by every step that is observed.

    Two things are kept apart: the pace of the machine, which scales all times alike and follows
    quickly, and the shape, of which only what lies next to an observed step follows, slowly. So
    times of rows that were not seen lately stay in proportion to the others.

    A row more never takes less than the one before: first weights are read whatever the rows,
    then each row is work. Points that noise has put above such a line are not looked at.
    """

    def __init__(self, points: Points) -> None:
        self._rows = [rows for rows, _ in points]
        self._shape = [seconds for _, seconds in points]
        self._pace = 1.0
        self._corners = _convex(self._rows, self._shape)

    def of(self, num_rows: int) -> float:
        """Seconds of a step of at least one row."""
        corners = self._corners
        return self._pace * sum(
            corners[place][1] * part
            for place, part in _parts([rows for rows, _ in corners], num_rows)
        )

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn from a step of so many rows."""
        parts = _parts(self._rows, num_rows)
        expected = self._pace * sum(self._shape[place] * part for place, part in parts)
        if expected <= 0:
            return
        off = min(max(seconds / expected, _LEAST), _MOST) - 1.0
        self._pace *= 1.0 + _PACE_FOLLOWS * off
        for place, part in parts:
            # A point that the line only begins at, behind the last one, is left alone.
            self._shape[place] *= 1.0 + _SHAPE_FOLLOWS * off * min(max(part, 0.0), 1.0)
        self._corners = _convex(self._rows, self._shape)


def _parts(rows: Sequence[int], num_rows: int) -> list[tuple[int, float]]:
    """The points that a time is made of, and how much of each; level before the first."""
    if num_rows <= rows[0] or len(rows) == 1:
        return [(0, 1.0)]
    place = min(bisect_left(rows, num_rows), len(rows) - 1)
    share = (num_rows - rows[place - 1]) / (rows[place] - rows[place - 1])
    return [(place - 1, 1.0 - share), (place, share)]


def _convex(rows: Sequence[int], seconds: Sequence[float]) -> list[tuple[int, float]]:
    """The points between which lines grow ever steeper, and never fall, and have all others above.

    What is before the first of them takes as long as that.
    """
    corners: list[tuple[int, float]] = []
    for point in zip(rows, seconds, strict=True):
        while corners and (point[1] < corners[-1][1] or _bends_down(corners, point)):
            corners.pop()
        corners.append(point)
    return corners


def _bends_down(corners: Sequence[tuple[int, float]], point: tuple[int, float]) -> bool:
    """Whether the line to the last corner is no flatter than the one past it to the point."""
    if len(corners) < 2:
        return False
    return _slope(corners[-2], point) <= _slope(corners[-2], corners[-1])


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
