"""What a start finds in a home: adapters that are served, and some that cannot be read."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from dynamic_lora_adapters.errors import AdapterError, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.home.index import AdapterIndex, EventKind, StoredVersion
from dynamic_lora_adapters.home.inspection import AdapterVersion, Inspector, is_sound
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.home.store import BlobStore
from dynamic_lora_adapters.names import model_leaf

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A version that a name means and that cannot be served: it was stored by another release."""

    name: str
    digest: str
    why: str

    def error(self) -> UnsupportedAdapter:
        """What who asks for it is told."""
        return UnsupportedAdapter(
            f"{self.name!r} was stored by another release and cannot be read: {self.why}",
            field="adapter",
            fix="Upload it again or delete it, or serve it with the release that stored it.",
        )


@dataclass(slots=True)
class Recovered:
    """The names of one base."""

    versions: dict[str, AdapterVersion] = field(default_factory=dict)
    unreadable: dict[str, Unreadable] = field(default_factory=dict)


def base_key(geometry: BaseGeometry) -> str:
    """What tells one base's names from another's in a shared home."""
    text = f"{geometry.fingerprint} {model_leaf(geometry.model_id)}"
    return hashlib.sha256(text.encode()).hexdigest()


def recover(store: BlobStore, index: AdapterIndex, inspector: Inspector, base: str) -> Recovered:
    """Bring store and index together after whatever ended the last run.

    Rows whose files are damaged or gone are dropped, files that no row knows are removed. An
    adapter that cannot be read is kept as it is: the release that stored it still can.
    """
    found = Recovered()
    current = index.names()
    for stored in index.versions():
        if not _is_whole(stored, store, index):
            logger.warning("adapter %r dropped: its files are damaged or gone", stored.name)
            index.drop(stored.name, EventKind.LOST, base=stored.base)
        elif stored.base == base and current.get(stored.name) == stored.digest:
            _restore(stored, store, index, inspector, found)
    known = {stored.digest for stored in index.versions()}
    for digest in store.digests() - known:
        store.remove(digest)
    store.sweep()
    return found


def _is_whole(stored: StoredVersion, store: BlobStore, index: AdapterIndex) -> bool:
    """Whether its files are what they were; read only where they are of other sizes.

    They may be sound for all that: mended by an upload that did not come to write that down.
    """
    found = store.sizes(stored.digest)
    if found == stored.sizes:
        return True
    if not found or not is_sound(store.path(stored.digest), stored.digest):
        return False
    index.put_sizes(stored.digest, found)
    return True


def _restore(
    stored: StoredVersion,
    store: BlobStore,
    index: AdapterIndex,
    inspector: Inspector,
    found: Recovered,
) -> None:
    try:
        found.versions[stored.name] = _version(stored, store.path(stored.digest), index, inspector)
    except AdapterError as error:
        unreadable = Unreadable(stored.name, stored.digest, error.message)
        logger.warning("adapter %r is not served: %s", stored.name, unreadable.why)
        found.unreadable[stored.name] = unreadable


def _version(
    stored: StoredVersion, folder: Path, index: AdapterIndex, inspector: Inspector
) -> AdapterVersion:
    try:
        passport = _passport(stored.passport)
    except ValidationError:
        # Written by a release whose passports lacked some fields, or had others in their place.
        version = inspector.inspect(stored.name, folder, force=True, ignored_files=())
        if version.digest != stored.digest:
            raise InvalidAdapter("its content has another digest by now") from None
        passport = version.passport.model_copy(update={"created_at": stored.created_at})
        index.put_passport(stored.name, stored.digest, passport.model_dump_json())
    return AdapterVersion(
        name=stored.name,
        digest=stored.digest,
        passport=passport,
        card=passport.card,
        chat=ChatFormat.read(folder),
    )


def _passport(text: str) -> Passport:
    """A passport as it was written; a newer release may have said more in it."""
    document: Mapping[str, object] = json.loads(text)
    return Passport.model_validate_json(
        json.dumps({name: document[name] for name in Passport.model_fields if name in document})
    )
