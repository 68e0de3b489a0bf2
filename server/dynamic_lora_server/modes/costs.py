"""What a step costs: measured once at start-up, read before every step. Imports no torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

Points = tuple[tuple[int, float], ...]
"""Measured (token rows, seconds), by ascending rows; straight lines between them."""


class Mix(NamedTuple):
    """Who is in a step: all token rows, those that take a delta, and the adapters.

    Sizes are multiples of the adapters that costs were measured with. `delta_rows`
    counts a row as often as its adapter is large, for the arithmetic follows both;
    `size` adds the adapters up, whose tables are read once, whatever their rows.
    """

    num_rows: int
    delta_rows: float
    size: float


class Own(NamedTuple):
    """The merged adapter in a step: its rows, and its size."""

    rows: int
    size: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds of a step, as straight lines between measured points.

    `base` is the step of the base model. `deltas` holds, by ascending number of
    adapters and beginning with one, what the deltas of that many adapters of one size
    add; more adapters than were measured count as the most that were. `switch_s` is how long a
    merge, an unmerge or a swap holds up the step loop; infinity says that these weights
    cannot be merged. Past the last rows the last slope goes on. Seconds never fall with
    the rows; see `rising`. Raises ValueError for anything else.
    """

    base: Points
    deltas: tuple[tuple[int, Points], ...]
    switch_s: float

    def __post_init__(self) -> None:
        _check_points("base", self.base)
        counts = [count for count, _ in self.deltas]
        if not counts or counts[0] != 1 or counts != sorted(set(counts)):
            raise ValueError(f"deltas: expected ascending adapter counts from 1, got {counts}")
        for count, points in self.deltas:
            _check_points(f"deltas of {count}", points)
        if not self.switch_s >= 0:
            raise ValueError(f"switch_s must be at least 0, got {self.switch_s}")

    @classmethod
    def never_merging(cls) -> Self:
        """Costs that were not measured, because nothing will be merged."""
        return cls(base=((1, 0.0),), deltas=((1, ((1, 0.0),)),), switch_s=math.inf)

    def step_s(self, num_rows: int) -> float:
        """Seconds of a step of `num_rows` token rows without any delta."""
        return _at(self.base, num_rows) if num_rows > 0 else 0.0

    def delta_s(self, num_rows: float, size: float) -> float:
        """Seconds that adapters of this size in all, spread over `num_rows`, add to a step.

        Rows are counted as in `Mix`. Below the size of one adapter, what a single row of
        one costs goes down to nothing: its tables. What more rows add does not, for they
        are counted by size already.
        """
        if num_rows <= 0 or size <= 0:
            return 0.0
        one = self.deltas[0][1]
        arithmetic = _at(one, num_rows) - one[0][1]
        curve = (
            (0, arithmetic),
            *((count, _at(points, num_rows)) for count, points in self.deltas),
        )
        return _at(curve, min(size, curve[-1][0]))

    def overhead_s(self, mix: Mix, own: Own | None) -> float:
        """Seconds that all deltas of a step add.

        `own` is None with nothing merged; otherwise its rows cost nothing. Every other
        row takes the merged delta away again and adds its own, if it has one.
        """
        if own is None:
            return self.delta_s(mix.delta_rows, mix.size)
        foreign = mix.num_rows - own.rows
        others = mix.size - own.size if own.rows else mix.size
        left = self.delta_s(mix.delta_rows - own.rows * own.size, others)
        return left + self.delta_s(foreign * own.size, own.size)

    def batch_s(self, rows: Mapping[str | None, int], merged: str | None) -> float:
        """Seconds of a whole step with these token rows per adapter (None: the base model).

        All adapters are of the size that costs were measured with.
        """
        num_adapters = sum(1 for key, number in rows.items() if number and key is not None)
        num_rows = sum(rows.values())
        mix = Mix(num_rows, num_rows - rows.get(None, 0), num_adapters)
        own = None if merged is None else Own(rows.get(merged, 0))
        return self.step_s(mix.num_rows) + self.overhead_s(mix, own)

    def to_json(self) -> str:
        """The costs as text; a switch that is impossible is written as null."""
        switch_s = None if math.isinf(self.switch_s) else self.switch_s
        return json.dumps({"base": self.base, "deltas": self.deltas, "switch_s": switch_s})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        try:
            document = json.loads(text)
            switch_s = document.pop("switch_s")
            return cls(
                base=_points(document.pop("base")),
                deltas=tuple((int(n), _points(points)) for n, points in document.pop("deltas")),
                switch_s=math.inf if switch_s is None else float(switch_s),
                **document,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"these are no step costs: {error!r}") from error


def rising(points: Points) -> Points:
    """Measured points without the dips that noise makes: each at least the one before."""
    seconds = accumulate((second for _, second in points), max)
    return tuple((num_rows, s) for (num_rows, _), s in zip(points, seconds, strict=True))


def _points(document: list[tuple[int, float]]) -> Points:
    return tuple((int(num_rows), float(seconds)) for num_rows, seconds in document)


def _check_points(name: str, points: Points) -> None:
    rows = [num_rows for num_rows, _ in points]
    if not rows or rows[0] < 1 or rows != sorted(set(rows)):
        raise ValueError(f"{name}: expected points by ascending rows from 1 on, got rows {rows}")
    seconds = [second for _, second in points]
    if not all(math.isfinite(second) for second in seconds) or seconds[0] < 0:
        raise ValueError(f"{name}: seconds must be finite and at least 0")
    if seconds != sorted(seconds):
        raise ValueError(f"{name}: seconds must not fall with the rows, got {seconds}")


def _at(points: Points, x: float) -> float:
    """The line through `points` at `x`: level before the first, the last slope after the last."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    index = 1
    while index < len(points) - 1 and points[index][0] < x:
        index += 1
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    slope = (y1 - y0) / (x1 - x0)
    if x > x1:  # noise must not make larger steps free
        return y1 + max(slope, 0.0) * (x - x1)
    return y0 + slope * (x - x0)
