"""Who waits for what, at one moment."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Requests that were admitted, in continuations, and what they wait for before they run.

    `num_open` of `capacity` places are taken, `num_held_up` of them by continuations whose adapter
    is not on the device. `num_in_line` adapters wait for room there, the first since
    `first_waited_s` seconds. `queues` are the lines of work before the engine: how many wait in
    each.
    """

    num_open: int
    capacity: int
    num_held_up: int
    num_in_line: int
    first_waited_s: float
    queues: Mapping[str, int]
