"""Which home an index speaks of: an id, written into both.

A disk that is not mounted looks like a home that has lost all its files, and another database like
one whose names were all deleted. Neither is to cost an adapter: what differs is not served.
"""

import secrets

from dynamic_lora_adapters.errors import StoreFailed
from dynamic_lora_adapters.home.index import AdapterIndex
from dynamic_lora_adapters.home.store import BlobStore


def identify(store: BlobStore, index: AdapterIndex, base: str) -> set[str]:
    """The bases whose files the home has, with `base`, which is to be served.

    What an earlier release wrote has no id. It gets one if home and index name a content both, or
    if one of them has nothing that the other could lack. Raises `StoreFailed` where index and home
    do not belong together; nothing is changed then.
    """
    own, homes, there = store.id(), index.homes(), store.digests()
    if base in homes and homes[base] != own:
        raise _another_home(store, index, homes[base])
    is_known = own in homes.values()
    unclaimed = [stored for stored in index.versions() if stored.base not in homes]
    claimed: set[str] = set()
    if own is None or is_known:
        claimed = {stored.base for stored in unclaimed if stored.digest in there}
    if there and not is_known and not claimed:
        raise _no_names(store, index, own)
    if base not in claimed and any(stored.base == base for stored in unclaimed):
        raise _no_files(store, index)
    if own is None:
        own = secrets.token_hex(16)
        store.put_id(own)
    index.put_homes(dict.fromkeys({base, *claimed} - homes.keys(), own))
    return {one for one, home in index.homes().items() if home == own}


def _another_home(store: BlobStore, index: AdapterIndex, theirs: str) -> StoreFailed:
    return _apart(
        f"{str(store.home)!r} is not the home whose adapters {index.place} names for this base "
        "model.",
        f"Only if that home is gone for good, write {theirs} into {store.id_file}: then this one "
        "takes its place; names without files and files without names are dropped.",
    )


def _no_names(store: BlobStore, index: AdapterIndex, own: str | None) -> StoreFailed:
    again = "" if own is None else f"If these two do, delete {store.id_file}. "
    return _apart(
        f"{index.place} does not know the home {str(store.home)!r}, which has adapters.",
        f"{again}Only if its adapters are to be given up, delete {store.home / 'adapters'}.",
    )


def _no_files(store: BlobStore, index: AdapterIndex) -> StoreFailed:
    return _apart(
        f"{str(store.home)!r} has none of the adapters that {index.place} names for this base "
        "model.",
        "Only if the files are gone for good, begin with an empty database.",
    )


def _apart(message: str, only_if: str) -> StoreFailed:
    fix = "Mount the home's disk, or give the --home and the --database-url that belong together."
    return StoreFailed(message, field="home", fix=f"{fix} {only_if}")
