"""Which adapter, if any, the weights should hold in the next step. Imports no torch.

Renting or buying: bypass rents, a switch buys. A policy that buys when the rent
paid so far has reached the price costs at most a fixed multiple of the best
hindsight, whatever comes (Karlin, Manasse, Rudolph and Sleator, 1988). Here the
rent is what each step costs beyond the same step with another adapter merged,
the price is the time of a switch, and nothing is assumed about the future.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from dynamic_lora_server.modes.costs import Mix, Own, StepCosts

MAX_TRACKED = 4
MAX_CAUTION = 64.0
# What a merge must save of a step to count: less lies within what costs are measured to,
# and chance alone would carry a balance that never goes below zero upwards.
MIN_GAIN = 0.02
CAUTION_HALVES_AFTER = 200.0  # times the duration of a switch


class Mode(StrEnum):
    """How the server chooses between bypass and merged."""

    AUTO = "auto"
    BYPASS = "bypass"
    MERGED = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a decision looks at; the key None is the base model.

    `merged` is what the weights hold now. `rows` counts the token rows of the next
    step, by adapter; rows that take no delta count as the base model's. `requests`
    counts requests, running and waiting, by adapter; each adapter of `rows` has some.
    `sizes` says how large adapters are, as multiples of what costs were measured with;
    1 where it says nothing.
    """

    merged: str | None
    rows: Mapping[str | None, int]
    requests: Mapping[str | None, int]
    sizes: Mapping[str, float] = field(default_factory=dict)

    def own(self, adapter: str) -> Own:
        """The adapter's part in the step."""
        return Own(self.rows.get(adapter, 0), self.sizes.get(adapter, 1.0))


class ModePolicy:
    """Decides before every step. Deterministic; reads no clock; not thread-safe.

    In `auto`, every alternative to what is merged now keeps a balance: each step
    adds what it would have saved, or takes off what it would have lost, down to
    zero. From what a merge would have saved MIN_GAIN of the step is taken off first.
    An alternative is taken once its balance has reached the time of a switch;
    then all balances begin again at zero. To merge (not to unmerge), the balance
    must reach the switch time multiplied by a caution, which doubles with every
    merge that was given up before it had saved two switches, and halves with each
    that did save them, and with time.

    `can_merge` names the adapters that may be merged; it is asked before every step.
    """

    def __init__(
        self,
        costs: StepCosts,
        mode: Mode = Mode.AUTO,
        *,
        can_merge: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.mode = mode
        self._switch_s = costs.switch_s
        self._can_merge = can_merge
        # Steps repeat: with few distinct mixes the interpolation is mostly a look-up.
        self._overhead_s = lru_cache(maxsize=4096)(costs.overhead_s)
        self._step_s = lru_cache(maxsize=4096)(costs.step_s)
        self._balances: dict[str | None, float] = {}
        self._merged: str | None = None
        self._saved_s = 0.0
        self._caution = 1.0
        self._cautious_since = 0.0

    @property
    def caution(self) -> float:
        """How many switch times a merge must have been worth before it is made."""
        return self._caution

    def decide(self, load: Load, now: float) -> str | None:
        """What is to be merged in the next step: `load.merged`, another adapter, or None.

        A switch is only ever made to an adapter that has rows in the next step. What is
        merged may stay so while nobody asks for it. `now` is in seconds, from any start.
        """
        if self.mode is Mode.BYPASS:
            return None
        if self.mode is Mode.MERGED:
            return self._most_used(load)
        if load.merged != self._merged:
            self._begin(load.merged)
        self._relax(now)
        chosen = self._weigh(load)
        if chosen != load.merged:
            self._settle(load.merged, now)
            self._begin(chosen)
        return chosen

    def _most_used(self, load: Load) -> str | None:
        best, most = load.merged, 0
        if best is not None:
            most = load.requests.get(best, 0)
        for adapter, number in load.requests.items():
            if number > most and adapter is not None and self._can_merge(adapter):
                best, most = adapter, number
        return best

    def _weigh(self, load: Load) -> str | None:
        """Bring the balances up to date with the next step; what is worth switching to."""
        rows, merged, balances = load.rows, load.merged, self._balances
        mix, tops = self._survey(load)
        bypass_s = current_s = self._overhead_s(mix, None)
        if merged is not None:
            current_s = self._overhead_s(mix, load.own(merged))
            self._saved_s += bypass_s - current_s
        best, most = merged, 0.0
        for other in self._alternatives(merged, tops):
            other_s = bypass_s if other is None else self._overhead_s(mix, load.own(other))
            gain = current_s - other_s
            if other is not None:
                gain -= MIN_GAIN * self._step_s(mix.num_rows)
            balance = balances.get(other, 0.0) + gain
            if balance <= 0:
                balances.pop(other, None)
                continue
            balances[other] = balance
            ready = gain > 0 and balance >= self._price_s(other)
            # One may be deleted that had a balance already.
            possible = other is None or (rows.get(other) and self._can_merge(other))
            if ready and balance > most and possible:
                best, most = other, balance
        return best

    def _survey(self, load: Load) -> tuple[Mix, set[str]]:
        """The mix of a step, and who has most rows or most weight beside the merged adapter."""
        delta_rows = size = 0.0
        common = heavy = None
        most = heaviest = 0.0
        for adapter, number in load.rows.items():
            if adapter is None or not number:
                continue
            own = load.sizes.get(adapter, 1.0)
            weight = number * own
            delta_rows += weight
            size += own
            if (number <= most and weight <= heaviest) or adapter == load.merged:
                continue
            if self._can_merge(adapter):
                common, most = (adapter, number) if number > most else (common, most)
                heavy, heaviest = (adapter, weight) if weight > heaviest else (heavy, heaviest)
        tops = {adapter for adapter in (common, heavy) if adapter is not None}
        return Mix(sum(load.rows.values()), delta_rows, size), tops

    def _alternatives(self, merged: str | None, tops: Collection[str]) -> list[str | None]:
        """Unmerging, those with a balance, and `tops`.

        What a merge saves grows with the adapter's rows and with its size; one that has
        most of neither hardly ever saves most, and is not looked at.
        """
        balances = self._balances
        while len(balances) > MAX_TRACKED:
            del balances[min(balances, key=balances.__getitem__)]
        found = list(balances)
        if merged is not None and None not in balances:
            found.append(None)
        found.extend(sorted(set(tops).difference(balances.keys())))
        return found

    def _price_s(self, other: str | None) -> float:
        return self._switch_s if other is None else self._switch_s * self._caution

    def _begin(self, merged: str | None) -> None:
        self._merged = merged
        self._balances.clear()
        self._saved_s = 0.0

    def _settle(self, merged: str | None, now: float) -> None:
        """Learn from the merge that ends now, if it is one."""
        if merged is None:
            return
        paid = self._saved_s >= 2 * self._switch_s
        self._caution *= 0.5 if paid else 2.0
        self._caution = min(max(self._caution, 1.0), MAX_CAUTION)
        self._cautious_since = now

    def _relax(self, now: float) -> None:
        since = now - self._cautious_since
        if self._caution > 1.0 and since >= CAUTION_HALVES_AFTER * self._switch_s:
            self._caution = max(self._caution / 2, 1.0)
            self._cautious_since = now
