"""Bounds what adapters fetched from the Hub take of the disk: the least recently used go first."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from dynamic_lora_adapters.compositions.saved import SavedCompositions
from dynamic_lora_adapters.compositions.text import parse
from dynamic_lora_adapters.errors import AdapterNotFound, StoreFailed
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.home.registry import AdapterRegistry

# A request that has named an adapter, or had it fetched, may not have its lease yet.
_IN_USE_SECONDS = 60.0

logger = logging.getLogger(__name__)


def make_room(
    registry: AdapterRegistry,
    saved: SavedCompositions,
    max_bytes: int,
    *,
    newest: Passport | None = None,
) -> list[str]:
    """Delete fetched adapters until their weights take no more than `max_bytes`; their names.

    Uploaded ones stay, also where one has the same content; so do those that requests hold or
    have named within a minute, and those of saved compositions. Raises StoreFailed where these
    take more, and `newest`, which was just fetched, is deleted; if somebody uploaded it meanwhile
    it stays. Blocking; one at a time, or the newest of two would make way for each other.
    """
    fetched = _fetched(registry)
    num_names = Counter(passport.version for passport in fetched)
    total = sum({passport.version: passport.bytes for passport in fetched}.values())
    gone: list[str] = []
    idle = _by_use([one for one in fetched if one != newest], registry, saved)
    if total - _freed(idle, num_names) > max_bytes:
        idle = []  # none is to go in vain
    for passport in idle:
        if total <= max_bytes:
            break
        if _delete(passport, saved):
            gone.append(passport.name)
        num_names[passport.version] -= 1
        if not num_names[passport.version]:
            total -= passport.bytes
    if total <= max_bytes:
        return gone
    if newest is not None and not _delete(newest, saved):
        return gone
    raise StoreFailed(
        "The adapters from the Hub that are in use take all the room that they may have.",
        field="adapter",
        fix="Try again later, or start the server with a larger --max-hub-bytes.",
    )


def _freed(idle: list[Passport], num_names: Mapping[str, int]) -> int:
    """Bytes of the contents that nobody names any more once these have gone."""
    going = Counter(passport.version for passport in idle)
    sizes = {passport.version: passport.bytes for passport in idle}
    return sum(sizes[version] for version, count in going.items() if count == num_names[version])


def _fetched(registry: AdapterRegistry) -> list[Passport]:
    """Those whose files are there for nobody else."""
    passports = registry.list()
    uploaded = {passport.version for passport in passports if not passport.fetched}
    return [one for one in passports if one.fetched and one.version not in uploaded]


def _by_use(
    fetched: list[Passport], registry: AdapterRegistry, saved: SavedCompositions
) -> list[Passport]:
    """Those that nobody uses, the least recently used first: since the start, else by their age."""
    named = saved.last_named.copy()
    composed = {part.name for one in saved.list() for part in parse(one.text).parts}
    recently = time.monotonic() - _IN_USE_SECONDS
    lately = datetime.now(UTC) - timedelta(seconds=_IN_USE_SECONDS)
    idle = [
        one
        for one in fetched
        if not registry.is_leased(one.version)
        and one.name not in composed
        and named.get(one.name, recently) <= recently
        and one.created_at <= lately
    ]
    return sorted(idle, key=lambda one: (named.get(one.name, -1.0), one.created_at))


def _delete(passport: Passport, saved: SavedCompositions) -> bool:
    """Whether it was there still: somebody else may have deleted it, or uploaded another."""
    try:
        saved.delete_adapter(passport.name, only=passport)
    except AdapterNotFound:
        return False
    logger.info("adapter %r from the Hub was deleted to make room", passport.name)
    return True
