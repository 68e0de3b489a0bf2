"""The adapters a server knows: from an upload's folder to factors under a name."""

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pydantic import ValidationError

from dynamic_lora_adapters.archive import CONFIG_FILE, Intake, UploadLimits
from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.chat import ChatFormat
from dynamic_lora_adapters.errors import (
    AdapterNotFound,
    IncompatibleAdapter,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.index import (
    AdapterEvent,
    AdapterIndex,
    EventKind,
    StoredVersion,
    shipped_digests,
)
from dynamic_lora_adapters.inspection import (
    AdapterVersion,
    Inspector,
    declared_base,
    folder_digest,
)
from dynamic_lora_adapters.names import check_adapter_name, model_leaf
from dynamic_lora_adapters.near_names import near_names
from dynamic_lora_adapters.passport import Passport
from dynamic_lora_adapters.store import BlobStore
from dynamic_lora_adapters.terms import AdapterTerms

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Publication:
    """The outcome of an upload; `created` is False if the name had this content already."""

    passport: Passport
    created: bool


class Lease(AbstractContextManager["Lease"]):
    """Keeps a version's files on disk while it is in use; releasing twice is harmless."""

    __slots__ = ("_registry", "released", "version")

    def __init__(self, version: AdapterVersion, registry: "AdapterRegistry") -> None:
        self.version = version
        self.released = False
        self._registry = registry

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._registry.release(self)


class AdapterRegistry:
    """Names to adapter versions, kept on disk under `home` and fitted to one base.

    All methods may be called from any thread; they block, `publish` for as long
    as reading the weights takes. `resolve` and `list` touch no disk. Opening
    cleans up after a crash, and raises `AdapterError` while another process
    uses the home. Use `close`, or the registry as a context manager.

    `database_url` names another database than `home/index.sqlite`; a database
    serves one home only. `base` gives the base model's own parameters, for the
    adapters that are read against them; `dtype` is the one adapters are served
    in, and `factor_dtype` that of their factors if it is another, for their self-check.
    """

    def __init__(
        self,
        home: Path,
        geometry: BaseGeometry,
        *,
        limits: UploadLimits | None = None,
        database_url: str | None = None,
        base: BaseWeights | None = None,
        dtype: "torch.dtype | None" = None,
        factor_dtype: "torch.dtype | None" = None,
    ) -> None:
        self.limits = limits or UploadLimits()
        self._geometry = geometry
        self._inspector = Inspector(geometry, base=base, dtype=dtype, factor_dtype=factor_dtype)
        self._store = BlobStore(home)
        self._index = AdapterIndex(
            database_url or f"sqlite:///{home / 'index.sqlite'}", _base_key(geometry)
        )
        self._lock = threading.RLock()
        self._num_leases: Counter[str] = Counter()
        self._versions: dict[str, AdapterVersion] = {}
        self._forgotten: set[str] = set()  # left by a name, and leased
        # Told the digest of a content that is gone for good, by the thread that ended it and
        # under the registry's lock: it must neither wait nor raise.
        self.on_removed: Callable[[str], object] | None = None
        self._recover()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the index and let another process have the home."""
        self._index.close()
        self._store.close()

    @property
    def dtype(self) -> "torch.dtype":
        """The number format that adapters are served in."""
        return self._inspector.dtype

    @property
    def index(self) -> AdapterIndex:
        """The home's index, for what else is kept per base model."""
        return self._index

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh folder on the store's disk to collect one upload in (see `Intake`)."""
        return self._store.staging()

    def publish(
        self,
        name: str,
        folder: Path,
        *,
        force: bool = False,
        ignored_files: Sequence[str] = (),
    ) -> Publication:
        """Check everything about the adapter in a `staging` folder and give it a name.

        A name that exists moves to the new content; requests that hold a lease
        keep the old one. `force` accepts an adapter that declares another base
        model, if its shapes fit. Raises an `AdapterError`; nothing is changed then.
        """
        check_adapter_name(
            name, reserved=(self._geometry.model_id, model_leaf(self._geometry.model_id))
        )
        version = self._inspector.inspect(name, folder, force=force, ignored_files=ignored_files)
        return self._commit(version, folder)

    def resolve(self, name: str) -> AdapterVersion:
        """The version a name means now; raises `AdapterNotFound` with the near misses."""
        version = self._versions.get(name)
        if version is None:
            raise AdapterNotFound(name, near_names(name, self._versions.copy()))
        return version

    def has(self, name: str) -> bool:
        """Whether a name means a version now."""
        return name in self._versions

    def list(self) -> Sequence[Passport]:
        """The passports of all adapters that fit the base, by name."""
        versions = self._versions.copy()
        return [versions[name].passport for name in sorted(versions)]

    def delete(self, name: str) -> None:
        """Forget a name. Its files go when no other name and no lease needs them."""
        with self._lock:
            version = self.resolve(name)
            self._index.drop(name, EventKind.DELETED)
            del self._versions[name]
            self._collect(version.digest)

    def lease(self, name: str) -> Lease:
        """Resolve a name and keep that version's files until `release`."""
        with self._lock:
            version = self.resolve(name)
            self._num_leases[version.digest] += 1
        return Lease(version, self)

    def release(self, lease: Lease) -> None:
        """End a lease; the last one of a forgotten version removes its files."""
        with self._lock:
            if lease.released:
                return
            lease.released = True
            digest = lease.version.digest
            self._num_leases[digest] -= 1
            if self._num_leases[digest] == 0:
                del self._num_leases[digest]
                if digest in self._forgotten:
                    self._collect_quietly(digest)

    def load(self, digest: str) -> AdapterTerms:
        """Read what a version does, checked again.

        Hold a lease meanwhile. Raises `AdapterNotFound` if the files are gone.
        """
        folder = self._store.path(digest)
        if not folder.is_dir():
            raise AdapterNotFound(digest)
        return self._inspector.read(folder)

    def history(self, name: str | None = None) -> Sequence[AdapterEvent]:
        """What happened to a name, or to all, oldest first; deleted names included."""
        return self._index.history(name)

    def import_shipped(self, folder: Path) -> Sequence[str]:
        """Publish the adapters that come with the package, under their folders' names.

        Each is published once: a name that the user deleted stays deleted, one
        that the user gave to another adapter stays the user's. New content
        replaces an earlier shipped one. Adapters that do not fit this base are
        skipped. Returns the names that were published.
        """
        names = [p.name for p in sorted(folder.iterdir()) if (p / CONFIG_FILE).is_file()]
        return [name for name in names if self._import_one(name, folder / name)]

    def _import_one(self, name: str, source: Path) -> bool:
        shipped = shipped_digests(self._index.history(name))
        current = self._versions.get(name)
        if shipped and current is None:
            return False
        if current is not None and current.digest not in shipped:
            logger.info("shipped adapter %r skipped: the name is taken", name)
            return False
        declared = declared_base(source)
        if declared is not None and model_leaf(declared) != model_leaf(self._geometry.model_id):
            logger.info("shipped adapter %r skipped: The adapter was trained on %s", name, declared)
            return False
        # Not reading the factors keeps PEFT out of an ordinary start.
        if current is not None and current.digest == folder_digest(source):
            return False
        with self.staging() as folder:
            intake = Intake(folder, self.limits)
            intake.add_folder(source)
            try:
                version = self._inspector.inspect(
                    name, folder, force=False, ignored_files=intake.ignored_files
                )
            except (IncompatibleAdapter, UnsupportedAdapter) as error:
                logger.info("shipped adapter %r skipped: %s", name, error)
                return False
            self._commit(version, folder, shipped=True)
        return True

    def _commit(
        self, version: AdapterVersion, folder: Path, *, shipped: bool = False
    ) -> Publication:
        with self._lock:
            current = self._versions.get(version.name)
            if current is not None and current.digest == version.digest:
                return Publication(current.passport, created=False)
            # Files first: a crash in between leaves files that no row knows,
            # which the next start removes.
            if version.chat is not None:
                version.chat.save(folder)
            self._store.publish(folder, version.digest)
            try:
                self._index.put(
                    version.name,
                    version.digest,
                    passport=version.passport.model_dump_json(),
                    sizes=self._store.sizes(version.digest),
                    shipped=shipped,
                )
            except Exception:
                self._collect(version.digest)
                raise
            self._versions[version.name] = version
            if current is not None:
                self._collect(current.digest)
            return Publication(version.passport, created=True)

    def _collect(self, digest: str) -> None:
        """Remove a content that a name has left, unless something else needs it."""
        if digest in self._num_leases:
            self._forgotten.add(digest)
            return
        self._forgotten.discard(digest)
        if not self._index.is_used(digest):
            self._store.remove(digest)
            if self.on_removed is not None:
                self.on_removed(digest)

    def _collect_quietly(self, digest: str) -> None:
        """The same for whom has had its answer, which is right even if the index cannot be asked.

        The next start finds files that no name needs.
        """
        try:
            self._collect(digest)
        except Exception:
            logger.exception("content %.12s stays until the next start", digest)

    def _recover(self) -> None:
        base = _base_key(self._geometry)
        current = self._index.names()
        for stored in self._index.versions():
            if self._store.sizes(stored.digest) != stored.sizes:
                logger.warning("adapter %r dropped: its files are damaged or gone", stored.name)
                self._index.drop(stored.name, EventKind.LOST, base=stored.base)
            elif stored.base == base and current.get(stored.name) == stored.digest:
                self._versions[stored.name] = self._restore(stored)
        known = {stored.digest for stored in self._index.versions()}
        for digest in self._store.digests() - known:
            self._store.remove(digest)

    def _restore(self, stored: StoredVersion) -> AdapterVersion:
        folder = self._store.path(stored.digest)
        try:
            passport = Passport.model_validate_json(stored.passport)
        except ValidationError:
            # Written by a release whose passports had other fields.
            return self._inspector.inspect(stored.name, folder, force=True, ignored_files=())
        return AdapterVersion(
            name=stored.name,
            digest=stored.digest,
            passport=passport,
            card=passport.card,
            chat=ChatFormat.read(folder),
        )


def _base_key(geometry: BaseGeometry) -> str:
    """What tells one base's names from another's in a shared home."""
    text = f"{geometry.fingerprint} {model_leaf(geometry.model_id)}"
    return hashlib.sha256(text.encode()).hexdigest()
