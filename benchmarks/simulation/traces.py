"""Traces: synthetic ones, and those that a server has recorded."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dynamic_lora_server.recorder import Arrival

_KEYS = {field.name for field in fields(Arrival)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What synthetic traces have in common. Lengths are uniform around their means."""

    num_requests: int = 600
    num_adapters: int = 8
    rate: float
    """Requests per second, on average."""
    mean_prompt_tokens: int = 64
    mean_output_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1 or self.num_adapters < 1 or not 0 < self.rate < math.inf:
            raise ValueError("a trace needs requests, adapters and a rate above 0")
        if self.mean_prompt_tokens < 1 or self.mean_output_tokens < 1:
            raise ValueError("mean lengths must be at least 1")


def synthetic(kind: str, shape: Shape) -> list[Arrival]:
    """The trace of a kind in `TRACES`, the same for the same shape. Raises ValueError."""
    if kind not in TRACES:
        raise ValueError(f"trace {kind!r}: expected one of {', '.join(TRACES)}")
    rng = random.Random(f"{kind}/{shape.seed}")
    times, adapters = TRACES[kind](shape, rng)
    return [
        _arrival(time, adapter, shape, rng) for time, adapter in zip(times, adapters, strict=True)
    ]


def read_trace(path: Path) -> list[Arrival]:
    """Read what `TraceRecorder` wrote: one JSON object a line with the four fields of `Arrival`.

    Sorted by arrival. What follows the last whole line is left out if it cannot be read: a
    recording that was cut off. Raises ValueError, naming the line.
    """
    arrivals = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    arrivals.append(_parse(json.loads(line)))
                except (TypeError, ValueError) as error:
                    if not line.endswith("\n") and arrivals:
                        break
                    raise ValueError(f"{path.name}, line {number}: {error}") from error
    if not arrivals:
        raise ValueError(f"{path.name} holds no request")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _parse(document: object) -> Arrival:
    if not isinstance(document, dict) or set(document) != _KEYS:
        raise ValueError(f"expected an object with exactly {', '.join(sorted(_KEYS))}")
    adapter = document["adapter"]
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError("adapter must be a string or null")
    for key in ("num_prompt_tokens", "num_output_tokens"):
        if type(document[key]) is not int:
            raise ValueError(f"{key} must be a whole number")
    return Arrival(**document)


def _arrival(time: float, adapter: int, shape: Shape, rng: random.Random) -> Arrival:
    return Arrival(
        arrival_s=time,
        adapter=f"adapter-{adapter}",
        num_prompt_tokens=_length(shape.mean_prompt_tokens, rng),
        num_output_tokens=_length(shape.mean_output_tokens, rng),
    )


def _length(mean: int, rng: random.Random) -> int:
    return rng.randint(max(mean // 4, 1), 2 * mean - max(mean // 4, 1))


Drawn = tuple[Sequence[float], Sequence[int]]
"""Arrival times and adapters, request by request."""


def _poisson(rate: float, number: int, rng: random.Random, start: float = 0.0) -> list[float]:
    def times() -> Iterator[float]:
        now = start
        for _ in range(number):
            yield now
            now += rng.expovariate(rate)

    return list(times())


def _weighted(weights: Callable[[int], list[float]]) -> Callable[[Shape, random.Random], Drawn]:
    """Poisson arrivals, each of an adapter drawn by `weights(num_adapters)`."""

    def draw(shape: Shape, rng: random.Random) -> Drawn:
        times = _poisson(shape.rate, shape.num_requests, rng)
        shares = weights(shape.num_adapters)
        return times, rng.choices(range(shape.num_adapters), shares, k=shape.num_requests)

    return draw


def _zipf(exponent: float) -> Callable[[int], list[float]]:
    return lambda number: [rank**-exponent for rank in range(1, number + 1)]


def _hot(share: float) -> Callable[[int], list[float]]:
    """The first adapter takes `share`, the others the rest."""
    return lambda number: [share] + [(1 - share) / max(number - 1, 1)] * (number - 1)


def _moving(shape: Shape, rng: random.Random) -> Drawn:
    """Four of five requests go to one adapter, which is another one every sixth of the trace."""
    times = _poisson(shape.rate, shape.num_requests, rng)
    adapters = []
    for index in range(shape.num_requests):
        hot = 6 * index // shape.num_requests
        drawn = hot if rng.random() < 0.8 else rng.randrange(shape.num_adapters)
        adapters.append(drawn % shape.num_adapters)
    return times, adapters


def _bursts(shape: Shape, rng: random.Random) -> Drawn:
    """Half the requests come uniformly; the others in bursts of up to 40 for one adapter."""
    background = shape.num_requests // 2
    drawn = [
        (time, rng.randrange(shape.num_adapters))
        for time in _poisson(shape.rate / 2, background, rng)
    ]
    length = shape.num_requests / shape.rate
    while len(drawn) < shape.num_requests:
        number = min(40, shape.num_requests - len(drawn))
        adapter = rng.randrange(shape.num_adapters)
        start = rng.random() * length
        drawn += [(time, adapter) for time in _poisson(10 * shape.rate, number, rng, start)]
    drawn.sort()
    return [time for time, _ in drawn], [adapter for _, adapter in drawn]


TRACES: dict[str, Callable[[Shape, random.Random], Drawn]] = {
    "single": _weighted(_hot(1.0)),
    "one-hot": _weighted(_hot(0.9)),
    "zipf-2.0": _weighted(_zipf(2.0)),
    "zipf-1.5": _weighted(_zipf(1.5)),
    "zipf-1.0": _weighted(_zipf(1.0)),
    "zipf-0.8": _weighted(_zipf(0.8)),
    "uniform": _weighted(_zipf(0.0)),
    "moving": _moving,
    "bursts": _bursts,
}
"""Every kind of synthetic trace."""
