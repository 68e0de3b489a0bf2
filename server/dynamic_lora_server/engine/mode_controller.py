"""Carries the policy's choice out, before every step, on the engine's thread."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dynamic_lora_adapters.apply.merge import MergeFailed, Merger
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_server.engine.scheduler import Piece
from dynamic_lora_server.modes.costs import StepCosts
from dynamic_lora_server.modes.policy import Load, Mode, ModePolicy
from dynamic_lora_server.noop import noop

logger = logging.getLogger(__name__)

# How long an adapter is left unmerged whose merge has failed.
_BARRED_S = 60.0
# Adapters whose merges are counted each for itself, those merged last: others come and go.
MAX_COUNTED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeStats:
    """Switches so far, and how many token rows ran in which way.

    `merged` is the digest that the weights hold. `num_merged_rows` belonged to
    the adapter that was merged in their step, `num_bypass_rows` to any other,
    `num_base_rows` to none. `last_switch_s` and `switch_s` are seconds.
    """

    mode: Mode
    merged: str | None
    num_switches: int
    last_switch_s: float
    switch_s: float
    num_merged_rows: int
    num_bypass_rows: int
    num_base_rows: int


@dataclass(slots=True)
class _Counts:
    num_switches: int = 0
    switches: OrderedDict[str, int] = field(default_factory=OrderedDict)
    rows: Counter[str] = field(default_factory=Counter)
    last_switch_s: float = 0.0
    switch_s: float = 0.0


class ModeController:
    """Keeps what is merged in line with the policy. The engine's thread owns it.

    The merged adapter is kept in the pool, because the rows of others need its
    factors. `make_room` lets it go. One whose merge fails is served unmerged for a while.
    """

    def __init__(self, costs: StepCosts, mode: Mode, merger: Merger, pool: AdapterPool) -> None:
        self._policy = ModePolicy(costs, mode, can_merge=self._may_merge)
        self._present: dict[str, ResidentAdapter] = {}
        self._merger = merger
        self._pool = pool
        self._barred: dict[str, float] = {}  # until when, by digest
        self._counts = _Counts()
        self._let_go = False  # whether a slot was unpinned that `make_room` has not told of

    def before_step(
        self,
        pieces: Sequence[Piece],
        requests: Mapping[str | None, int],
        before_compute: Callable[[], object] = noop,
    ) -> None:
        """Merge, unmerge or swap if the policy says so.

        `requests` counts the running and waiting sequences by adapter digest. `before_compute`:
        see `Engine.step`.
        """
        merged = self._merger.merged
        if merged is not None and merged.doomed:
            before_compute()
            self._switch(None)
            merged = None
        rows = self._survey(pieces)
        now = None if merged is None else merged.digest
        sizes = {digest: adapter.size for digest, adapter in self._present.items()}
        if merged is not None:
            sizes[merged.digest] = merged.size
        load = Load(merged=now, rows=rows, requests=requests, sizes=sizes)
        chosen = self._policy.decide(load, time.monotonic())
        if chosen != now:
            before_compute()
            self._switch(None if chosen is None else self._present[chosen])
        self._count(rows)

    def _survey(self, pieces: Sequence[Piece]) -> Counter[str | None]:
        """Token rows of the next step by adapter."""
        rows: Counter[str | None] = Counter()
        self._present.clear()
        for piece in pieces:
            adapter = piece.sequence.adapter
            if adapter is None:
                rows[None] += piece.num_tokens
            else:
                rows[adapter.digest] += piece.num_tokens
                self._present[adapter.digest] = adapter
        return rows

    def _may_merge(self, digest: str) -> bool:
        # One that only waits may not be on the device yet.
        adapter = self._present.get(digest)
        if time.monotonic() < self._barred.get(digest, 0.0):
            return False
        return adapter is not None and adapter.mergeable and not adapter.doomed

    def make_room(self, *, doomed_only: bool = False) -> bool:
        """Unmerge, so that the merged adapter's slot can be given to another.

        False if nothing was merged, or with `doomed_only` nothing deleted, or if requests use the
        adapter: its slot would not be free without them, and it would be merged again for them.
        But True if a step has let one go since the last call, for nobody was told of that.
        """
        merged = self._merger.merged
        if merged is not None and (merged.doomed or not (doomed_only or merged.num_leases)):
            self._switch(None)
        let_go, self._let_go = self._let_go, False
        return let_go

    def stats(self) -> ModeStats:
        """A snapshot; may be taken from any thread."""
        merged, counts = self._merger.merged, self._counts
        return ModeStats(
            mode=self._policy.mode,
            merged=None if merged is None else merged.digest,
            num_switches=counts.num_switches,
            last_switch_s=counts.last_switch_s,
            switch_s=counts.switch_s,
            num_merged_rows=counts.rows["merged"],
            num_bypass_rows=counts.rows["bypass"],
            num_base_rows=counts.rows["base"],
        )

    def num_switches_to(self, digest: str) -> int:
        """How often this adapter was merged; 0 if MAX_COUNTED others were merged since."""
        return self._counts.switches.get(digest, 0)

    def _switch(self, adapter: ResidentAdapter | None) -> None:
        before = self._merger.merged
        if adapter is before:
            return
        if adapter is not None and not self._pool.pin(adapter):
            return  # its request was cancelled and its slot given away in this moment
        try:
            if adapter is not None and not self._merger.spares_others(adapter):
                adapter.mergeable = False
                logger.info("adapter %.12s is not merged: others would lose digits", adapter.digest)
                return
            begin = time.perf_counter()
            self._merger.switch(adapter)
        except MergeFailed as error:
            self._bar(adapter, error)
            return
        finally:  # a switch that failed has left the base
            for pinned in (before, adapter):
                if pinned is not None and pinned is not self._merger.merged:
                    self._pool.unpin(pinned)
                    self._let_go = True
        self._counts.num_switches += 1
        self._counts.last_switch_s = time.perf_counter() - begin
        self._counts.switch_s += self._counts.last_switch_s
        if adapter is not None:
            self._count_switch(adapter.digest)

    def _count_switch(self, digest: str) -> None:
        switches = self._counts.switches
        switches[digest] = switches.get(digest, 0) + 1
        switches.move_to_end(digest)
        if len(switches) > MAX_COUNTED:
            switches.popitem(last=False)

    def _bar(self, adapter: ResidentAdapter | None, error: MergeFailed) -> None:
        """The weights are the base's: who asked is served in bypass."""
        if adapter is None:
            logger.warning("unmerging failed, and the base was restored: %s", error)
            return
        logger.error(
            "adapter %.12s is served unmerged, its merge failed: %s", adapter.digest, error
        )
        now = time.monotonic()
        self._barred = {one: until for one, until in self._barred.items() if until > now}
        self._barred[adapter.digest] = now + _BARRED_S

    def _count(self, rows: Mapping[str | None, int]) -> None:
        # What is merged, not what was chosen: a switch may not have come about.
        merged = self._merger.merged
        for digest, number in rows.items():
            if digest is None:
                self._counts.rows["base"] += number
            else:
                held = merged is not None and digest == merged.digest
                self._counts.rows["merged" if held else "bypass"] += number
