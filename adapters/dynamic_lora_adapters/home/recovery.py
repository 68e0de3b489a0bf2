"""What a start finds in a home: adapters that are served, and some that cannot be read.

What is merely not readable is never removed: it may be whole.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from dynamic_lora_adapters.errors import (
    AdapterError,
    InvalidAdapter,
    StoreFailed,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.home.identity import identify
from dynamic_lora_adapters.home.index import AdapterIndex, EventKind, StoredVersion
from dynamic_lora_adapters.home.inspection import AdapterVersion, Inspector, folder_digest
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.home.store import KEPT_FILES, BlobStore
from dynamic_lora_adapters.names import model_leaf

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A version that a name means and that cannot be served.

    Another release stored it, or, if it is `refused`, the system does not let its files be read.
    """

    name: str
    digest: str
    why: str
    refused: bool = False

    @classmethod
    def of(cls, name: str, digest: str, error: AdapterError | OSError) -> "Unreadable":
        """What the error says of it."""
        if isinstance(error, AdapterError):
            return cls(name, digest, error.message)
        return cls(name, digest, said(error), refused=True)

    def error(self) -> AdapterError:
        """What who asks for it is told."""
        if self.refused:
            return StoreFailed(
                f"The files of {self.name!r} cannot be read: {self.why}",
                field="adapter",
                fix="See to the server's disk and the files' owner and start it again, or delete "
                "the adapter.",
            )
        return UnsupportedAdapter(
            f"{self.name!r} was stored by another release and cannot be read: {self.why}",
            field="adapter",
            fix="Upload it again or delete it, or serve it with the release that stored it.",
        )


def said(error: OSError) -> str:
    """What the system says of a file in a home, without the home's path."""
    name = f"{Path(str(error.filename)).name}: " if error.filename else ""
    return f"{name}{error.strerror or error}."


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
    adapter that cannot be read is kept as it is: it may be readable once the disk is mended, or
    by the release that stored it. Raises `StoreFailed`, with nothing changed, where the two do not
    belong together.
    """
    found = Recovered()
    bases = identify(store, index, base)
    current = index.names()
    for stored in index.versions():
        if stored.base not in bases:
            continue
        is_served = stored.base == base and current.get(stored.name) == stored.digest
        try:
            if not _is_whole(stored, store, index):
                logger.warning("adapter %r dropped: its files are damaged or gone", stored.name)
                index.drop(stored.name, EventKind.LOST, base=stored.base)
            elif is_served:
                folder = store.path(stored.digest)
                found.versions[stored.name] = _version(stored, folder, index, inspector)
        except StoreFailed:  # the index's
            raise
        except (AdapterError, OSError) as error:
            unreadable = Unreadable.of(stored.name, stored.digest, error)
            logger.warning("adapter %r is not served: %s", stored.name, unreadable.why)
            if is_served:
                found.unreadable[stored.name] = unreadable
    _remove_unknown(store, {stored.digest for stored in index.versions()})
    return found


def _remove_unknown(store: BlobStore, known: set[str]) -> None:
    for digest in store.digests() - known:
        try:
            store.remove(digest)
        except StoreFailed as error:
            logger.warning("%s", error)
    store.sweep()


def _is_whole(stored: StoredVersion, store: BlobStore, index: AdapterIndex) -> bool:
    """Whether its files are what they were; read only where they are of other sizes.

    They may be sound for all that: mended by an upload that did not come to write that down.
    Raises OSError and AdapterError for files that cannot be read, which may be whole.
    """
    found = store.sizes(stored.digest)
    if found == stored.sizes:
        return True
    if unknown := stored.sizes.keys() - KEPT_FILES:
        raise UnsupportedAdapter(f"this release does not know its files {sorted(unknown)}.")
    if stored.sizes.keys() - found.keys():
        return False
    try:
        if folder_digest(store.path(stored.digest)) != stored.digest:
            return False
    except InvalidAdapter as error:
        # Whether weights are cut off can be told. Of the others, a newer release may say more.
        if error.field == WEIGHTS_FILE:
            return False
        raise
    index.put_sizes(stored.digest, found)
    return True


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
