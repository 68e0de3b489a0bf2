"""The index of a home: which name means which content, and what happened to it.

Five tables. `adapter_names` points each name at a digest; `adapter_versions`
holds the passport of a content under a name; `adapter_events` only grows;
`adapter_compositions` holds the text of each saved composition; `adapter_homes`
says which home has the files (see `identity`). All are kept per base model, so
that one home can serve several bases in turn and each keeps its own names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Text
from sqlmodel import Field, Session, SQLModel, select

from dynamic_lora_adapters.home.database import close_database, open_database


class EventKind(StrEnum):
    """What can happen to a name."""

    UPLOADED = "uploaded"
    MOVED = "moved"
    SHIPPED = "shipped"
    DELETED = "deleted"
    LOST = "lost"


class NameRow(SQLModel, table=True):
    """A name, and the content it means now."""

    __tablename__ = "adapter_names"

    base: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    digest: str = Field(index=True)
    created_at: str
    updated_at: str


class VersionRow(SQLModel, table=True):
    """A content under a name; `passport` and `sizes` (file to bytes) are JSON."""

    __tablename__ = "adapter_versions"

    base: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    digest: str = Field(primary_key=True)
    passport: str = Field(sa_type=Text)
    sizes: str = Field(sa_type=Text)
    created_at: str


class EventRow(SQLModel, table=True):
    """One line of history."""

    __tablename__ = "adapter_events"

    id: int | None = Field(default=None, primary_key=True)
    base: str
    name: str = Field(index=True)
    digest: str
    kind: str
    at: str


class CompositionRow(SQLModel, table=True):
    """A saved composition, as canonical text."""

    __tablename__ = "adapter_compositions"

    base: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    text: str = Field(sa_type=Text)
    created_at: str
    updated_at: str


class HomeRow(SQLModel, table=True):
    """The home that has the files of a base's adapters, by its id."""

    __tablename__ = "adapter_homes"

    base: str = Field(primary_key=True)
    home: str


@dataclass(frozen=True, slots=True)
class StoredComposition:
    """A saved composition as the index holds it; `created_at` survives a new text."""

    name: str
    text: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version as the index holds it."""

    base: str
    name: str
    digest: str
    passport: str
    sizes: Mapping[str, int]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One thing that happened to a name."""

    name: str
    digest: str
    kind: EventKind
    at: datetime


class AdapterIndex:
    """Names, versions and history in a database; each method is one transaction.

    All raise `StoreFailed` where the database cannot be reached, read or written.
    """

    def __init__(self, url: str, base: str) -> None:
        self._base = base
        self._engine = open_database(url)
        rows = (NameRow, VersionRow, EventRow, CompositionRow, HomeRow)
        SQLModel.metadata.create_all(self._engine, tables=[_table(row) for row in rows])

    def close(self) -> None:
        """Close all connections; none is made again."""
        close_database(self._engine)

    @property
    def place(self) -> str:
        """Where it is, as a URL without its password."""
        return self._engine.url.render_as_string()

    def homes(self) -> dict[str, str]:
        """The id of each base's home, as far as they have one."""
        with Session(self._engine) as session:
            return {row.base: row.home for row in session.exec(select(HomeRow)).all()}

    def put_homes(self, homes: Mapping[str, str]) -> None:
        """Say which homes bases have that had none."""
        with Session(self._engine) as session:
            session.add_all(HomeRow(base=base, home=home) for base, home in homes.items())
            session.commit()

    def names(self) -> dict[str, str]:
        """The digest of each name of this base."""
        with Session(self._engine) as session:
            rows = session.exec(select(NameRow).where(NameRow.base == self._base)).all()
            return {row.name: row.digest for row in rows}

    def versions(self) -> list[StoredVersion]:
        """Every version of every base."""
        with Session(self._engine) as session:
            return [_stored_version(row) for row in session.exec(select(VersionRow)).all()]

    def is_used(self, digest: str) -> bool:
        """Whether any version of any base has this content."""
        with Session(self._engine) as session:
            query = select(VersionRow).where(VersionRow.digest == digest)
            return session.exec(query).first() is not None

    def put(
        self,
        name: str,
        digest: str,
        *,
        passport: str,
        sizes: Mapping[str, int],
        shipped: bool = False,
    ) -> None:
        """Point `name` at `digest`; the version it pointed at before is dropped."""
        now = _now()
        with Session(self._engine) as session:
            row = session.get(NameRow, (self._base, name))
            kind = EventKind.UPLOADED if row is None else EventKind.MOVED
            if row is None:
                row = NameRow(
                    base=self._base, name=name, digest=digest, created_at=now, updated_at=now
                )
            else:
                self._drop_version(session, self._base, name, row.digest)
                row.digest, row.updated_at = digest, now
            session.add(row)
            session.add(
                VersionRow(
                    base=self._base,
                    name=name,
                    digest=digest,
                    passport=passport,
                    sizes=json.dumps(sizes, sort_keys=True),
                    created_at=now,
                )
            )
            kind = EventKind.SHIPPED if shipped else kind
            self._record(session, self._base, name, digest, kind)
            session.commit()

    def put_passport(self, name: str, digest: str, passport: str) -> None:
        """Replace the passport of a version of this base; the version must be there."""
        with Session(self._engine) as session:
            row = session.get_one(VersionRow, (self._base, name, digest))
            row.passport = passport
            session.add(row)
            session.commit()

    def put_sizes(self, digest: str, sizes: Mapping[str, int]) -> None:
        """Say anew how large the files of a content are, under every name of every base."""
        with Session(self._engine) as session:
            query = select(VersionRow).where(VersionRow.digest == digest)
            for row in session.exec(query).all():
                row.sizes = json.dumps(sizes, sort_keys=True)
                session.add(row)
            session.commit()

    def drop(self, name: str, kind: EventKind, *, base: str | None = None) -> None:
        """Forget a name (of `base`, by default the one served) and its version."""
        base = base or self._base
        with Session(self._engine) as session:
            row = session.get(NameRow, (base, name))
            if row is None:
                return
            self._drop_version(session, base, name, row.digest)
            session.delete(row)
            self._record(session, base, name, row.digest, kind)
            session.commit()

    def history(self, name: str | None = None) -> list[AdapterEvent]:
        """What happened to `name`, or to all names of this base, oldest first."""
        query = select(EventRow).where(EventRow.base == self._base)
        if name is not None:
            query = query.where(EventRow.name == name)
        with Session(self._engine) as session:
            rows = session.exec(query).all()
            events = sorted(rows, key=lambda row: row.id or 0)
            return [
                AdapterEvent(r.name, r.digest, EventKind(r.kind), datetime.fromisoformat(r.at))
                for r in events
            ]

    def compositions(self) -> list[StoredComposition]:
        """The saved compositions of this base, by name."""
        with Session(self._engine) as session:
            query = select(CompositionRow).where(CompositionRow.base == self._base)
            rows = sorted(session.exec(query).all(), key=lambda row: row.name)
            return [_stored_composition(row) for row in rows]

    def put_composition(self, name: str, text: str) -> StoredComposition:
        """Save a composition under a name, in place of the one it had."""
        now = _now()
        with Session(self._engine) as session:
            row = session.get(CompositionRow, (self._base, name))
            if row is None:
                row = CompositionRow(
                    base=self._base, name=name, text=text, created_at=now, updated_at=now
                )
            else:
                row.text, row.updated_at = text, now
            session.add(row)
            session.commit()
            return _stored_composition(row)

    def drop_composition(self, name: str) -> None:
        """Forget a saved composition; one that is not there is no error."""
        with Session(self._engine) as session:
            row = session.get(CompositionRow, (self._base, name))
            if row is not None:
                session.delete(row)
                session.commit()

    def _drop_version(self, session: Session, base: str, name: str, digest: str) -> None:
        version = session.get(VersionRow, (base, name, digest))
        if version is not None:
            session.delete(version)
            session.flush()

    def _record(self, session: Session, base: str, name: str, digest: str, kind: EventKind) -> None:
        session.add(EventRow(base=base, name=name, digest=digest, kind=kind, at=_now()))


def shipped_digests(events: Sequence[AdapterEvent]) -> set[str]:
    """The contents that came with the package, out of a name's history."""
    return {event.digest for event in events if event.kind is EventKind.SHIPPED}


def shipped_was_lost(events: Sequence[AdapterEvent]) -> bool:
    """Whether a name had what came with the package until the disk lost it."""
    last = events[-1] if events else None
    return (
        last is not None and last.kind is EventKind.LOST and last.digest in shipped_digests(events)
    )


def _stored_version(row: VersionRow) -> StoredVersion:
    return StoredVersion(
        base=row.base,
        name=row.name,
        digest=row.digest,
        passport=row.passport,
        sizes=json.loads(row.sizes),
        created_at=datetime.fromisoformat(row.created_at),
    )


def _stored_composition(row: CompositionRow) -> StoredComposition:
    return StoredComposition(row.name, row.text, datetime.fromisoformat(row.created_at))


def _table(row: type[SQLModel]) -> Any:
    return row.__table__  # type: ignore[attr-defined]


def _now() -> str:
    return datetime.now(UTC).isoformat()
