"""The adapters a server knows: from an upload's folder to factors under a name."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.errors import (
    AdapterNotFound,
    IncompatibleAdapter,
    StoreFailed,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.files.archive import CONFIG_FILE, Intake, UploadLimits
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.home.changes import Changes
from dynamic_lora_adapters.home.index import AdapterIndex, EventKind
from dynamic_lora_adapters.home.inspection import AdapterVersion, Inspector, folder_digest
from dynamic_lora_adapters.home.lease import Lease
from dynamic_lora_adapters.home.mending import is_damaged, mend
from dynamic_lora_adapters.home.passport import Passport, Publication
from dynamic_lora_adapters.home.recovery import Unreadable, base_key, recover, said
from dynamic_lora_adapters.home.shipping import is_wanted
from dynamic_lora_adapters.home.store import BlobStore
from dynamic_lora_adapters.names import check_adapter_name, model_leaf
from dynamic_lora_adapters.near_names import near_names
from dynamic_lora_adapters.terms import AdapterTerms

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class AdapterRegistry:
    """Names to adapter versions, kept on disk under `home` and fitted to one base.

    All methods may be called from any thread; they block, `publish` for as long as reading the
    weights takes. `resolve`, `lease`, `end_lease` and `list` touch no disk. Opening cleans up after
    a crash, and raises `AdapterError` while another process uses the home, unless it is given the
    home's `store`, which it then closes. Use `close`, or the registry as a context manager.

    `database_url` names another database than `home/index.sqlite`; in a database a base's names
    belong to one home, and opening another raises `StoreFailed`. `base` gives the base model's own
    parameters, for the adapters that are read against them; `dtype` is the one adapters are served
    in, and `factor_dtype` that of their factors if it is another, for their self-check.
    `reserved` are further names of the base model, which no adapter may get.
    """

    def __init__(
        self,
        home: Path,
        geometry: BaseGeometry,
        *,
        store: BlobStore | None = None,
        limits: UploadLimits | None = None,
        database_url: str | None = None,
        base: BaseWeights | None = None,
        dtype: "torch.dtype | None" = None,
        factor_dtype: "torch.dtype | None" = None,
        reserved: Sequence[str] = (),
    ) -> None:
        self.limits = limits or UploadLimits()
        self._geometry = geometry
        self.reserved = (geometry.model_id, model_leaf(geometry.model_id), *reserved)
        self._inspector = Inspector(geometry, base=base, dtype=dtype, factor_dtype=factor_dtype)
        self._store = store or BlobStore(home)
        self._index = AdapterIndex(
            database_url or f"sqlite:///{home / 'index.sqlite'}", base_key(geometry)
        )
        # `_changes` serialises writers and may wait for the disk; `_lock` guards what requests read
        # and never does. Take `_changes` first.
        self._changes = Changes(self._store)
        self._lock = threading.RLock()
        self._num_leases: Counter[str] = Counter()
        try:
            found = recover(self._store, self._index, self._inspector, base_key(geometry))
        except BaseException:
            self.close()
            raise
        self._versions, self._unreadable = found.versions, found.unreadable
        self._forgotten: set[str] = set()  # left by a name, and leased
        # Told the digest of a content that is gone for good, by the thread that ended it, while
        # nothing else changes: it must neither wait nor raise.
        self.on_removed: Callable[[str], object] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index and let another process have the home, once what changes it is done.

        Later changes raise `StoreFailed`.
        """
        with self._changes.closing():
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
        replace: bool = True,
        fetched: bool = False,
        ignored_files: Sequence[str] = (),
    ) -> Publication:
        """Check everything about the adapter in a `staging` folder and give it a name.

        A name that exists moves to the new content, unless it is not to `replace`; requests that
        hold a lease keep the old one. Files of the same content that were damaged on disk are
        replaced. `force` accepts an adapter that declares another base model, if its
        shapes fit. What is `fetched` says so in its passport, until somebody uploads it. Raises an
        `AdapterError`; nothing is changed then.
        """
        check_adapter_name(name, reserved=self.reserved)
        version = self._inspector.inspect(name, folder, force=force, ignored_files=ignored_files)
        return self._commit(version.marked(fetched=fetched), folder, replace=replace)

    def resolve(self, name: str) -> AdapterVersion:
        """The version a name means now.

        Raises `AdapterNotFound` with the near misses; for a version that cannot be read
        `UnsupportedAdapter` if another release stored it, `StoreFailed` if the system refuses.
        """
        version = self._versions.get(name)
        if version is None:
            if (unreadable := self._unreadable.get(name)) is not None:
                raise unreadable.error()
            raise AdapterNotFound(name, near_names(name, self._versions.copy()))
        return version

    def has(self, name: str) -> bool:
        """Whether a name is an adapter's now, also one that cannot be read."""
        return name in self._versions or name in self._unreadable

    def names(self) -> set[str]:
        """All names, those of adapters that cannot be read too."""
        return {*self._versions.copy(), *self._unreadable.copy()}

    def list(self) -> Sequence[Passport]:
        """The passports of all adapters that fit the base, by name."""
        versions = self._versions.copy()
        return [versions[name].passport for name in sorted(versions)]

    def unreadable(self) -> Sequence[Unreadable]:
        """What names mean and cannot be served, by name."""
        unreadable = self._unreadable.copy()
        return [unreadable[name] for name in sorted(unreadable)]

    def delete(self, name: str, *, only: Passport | None = None) -> None:
        """Forget a name. Its files go when no other name and no lease needs them.

        Raises `AdapterNotFound` if nothing has the name, or not what `only` says of it.
        """
        with self._changes.changing():
            version = self._versions.get(name)
            if only is not None and (version is None or version.passport != only):
                raise AdapterNotFound(name)
            digest = self._digest(name) or self.resolve(name).digest
            self._index.drop(name, EventKind.DELETED)
            with self._lock:
                self._versions.pop(name, None)
                self._unreadable.pop(name, None)
            self._try_remove_unused(digest)

    def lease(self, name: str) -> Lease:
        """Resolve a name and keep that version's files until `release`."""
        with self._lock:
            version = self.resolve(name)
            self._num_leases[version.digest] += 1
        return Lease(version, self.release)

    def is_leased(self, digest: str) -> bool:
        """Whether requests hold a version now."""
        return digest in self._num_leases

    def release(self, lease: Lease) -> None:
        """End a lease; the last one of a forgotten version removes its files."""
        if self.end_lease(lease):
            self.collect(lease.version.digest)

    def end_lease(self, lease: Lease) -> bool:
        """End a lease without waiting for the disk; whether to `collect` its version now."""
        with self._lock:
            if lease.released:
                return False
            lease.released = True
            digest = lease.version.digest
            self._num_leases[digest] -= 1
            if self._num_leases[digest]:
                return False
            del self._num_leases[digest]
            return digest in self._forgotten

    def collect(self, digest: str) -> None:
        """Remove a forgotten version's files, unless something needs them again.

        A registry that is closed leaves them to the next start.
        """
        with suppress(StoreFailed), self._changes.changing():
            self._try_remove_unused(digest)

    def load(self, digest: str) -> AdapterTerms:
        """Read what a version does, checked again.

        Hold a lease meanwhile. Raises `AdapterNotFound` if the files are gone, `StoreFailed` if
        the system does not let them be read.
        """
        folder = self._store.path(digest)
        try:
            if not folder.is_dir():
                raise AdapterNotFound(digest)
            return self._inspector.read(folder)
        except OSError as error:
            raise StoreFailed(
                f"The files of version {digest:.12} cannot be read: {said(error)}",
                field="adapter",
                fix="See to the server's disk and the files' owner.",
            ) from error

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
        unreadable, current = self._unreadable.get(name), self._digest(name)
        if unreadable is not None and unreadable.refused:
            return False  # it may be whole
        events, model_id = self._index.history(name), self._geometry.model_id
        if not is_wanted(name, source, events, current=current, model_id=model_id):
            return False
        # Not reading the factors keeps PEFT out of an ordinary start.
        if name in self._versions and current == folder_digest(source):
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
        self, version: AdapterVersion, folder: Path, *, shipped: bool = False, replace: bool = True
    ) -> Publication:
        if version.chat is not None:
            version.chat.check()
            version.chat.save(folder)
        self._store.prepare(folder)
        damaged = is_damaged(self._store, version.digest, self._versions.copy().values())
        with self._changes.changing():
            if damaged:
                mend(self._store, self._index, version.digest, folder)
            current = self._versions.get(version.name)
            if current is not None and (not replace or current.digest == version.digest):
                if replace and current.passport.fetched:
                    current = self._keep(current)
                return Publication(current.passport, created=False)
            before = self._digest(version.name)
            # Files first: a crash in between leaves files that no row knows,
            # which the next start removes.
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
                self._try_remove_unused(version.digest)
                raise
            with self._lock:
                self._versions[version.name] = version
                self._unreadable.pop(version.name, None)
            if before not in (None, version.digest):
                self._try_remove_unused(before)
            return Publication(version.passport, created=True)

    def _keep(self, version: AdapterVersion) -> AdapterVersion:
        """What was fetched, as what its uploader keeps from now on."""
        kept = version.marked(fetched=False)
        self._index.put_passport(kept.name, kept.digest, kept.passport.model_dump_json())
        with self._lock:
            self._versions[kept.name] = kept
        return kept

    def _digest(self, name: str) -> str | None:
        """The content that a name means, whether or not it can be read."""
        found = self._versions.get(name) or self._unreadable.get(name)
        return None if found is None else found.digest

    def _try_remove_unused(self, digest: str) -> None:
        """Remove a content that a name has left, unless something else needs it.

        Who asks has had its answer, which is right even if the index cannot be asked: the next
        start finds files that no name needs.
        """
        try:
            self._remove_unused(digest)
        except Exception:
            logger.exception("content %.12s stays until the next start", digest)

    def _remove_unused(self, digest: str) -> None:
        with self._lock:
            if digest in self._num_leases:
                self._forgotten.add(digest)
                return
            self._forgotten.discard(digest)
        if not self._index.is_used(digest):
            self._store.remove(digest)
            if self.on_removed is not None:
                self.on_removed(digest)
