"""The database of an index: how it is reached, and what its failures are called."""

import logging
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    IntegrityError,
    InterfaceError,
    ProgrammingError,
)
from sqlmodel import create_engine

from dynamic_lora_adapters.errors import StoreFailed

logger = logging.getLogger(__name__)


def open_database(url: str) -> Engine:
    """Connections to a database, all of whose failures are `StoreFailed`.

    A statement that is wrong, or that a constraint of a table forbids, raises as SQLAlchemy has it.

    Raises `StoreFailed` for a URL that is none, or names a driver that is not installed.
    """
    try:
        # A server may have closed a connection that nobody used for long.
        engine = create_engine(url, pool_pre_ping=True)
    except (ArgumentError, ImportError) as error:
        raise StoreFailed(
            f"The index's database cannot be used: {error}.",
            field="database_url",
            fix="Write the URL as SQLAlchemy does, and install the driver that it names.",
        ) from error
    event.listen(engine, "handle_error", _say_what_failed)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _wait_for_other_connections)
    return engine


def close_database(engine: Engine) -> None:
    """Close all connections; none is made again."""
    if not event.contains(engine, "do_connect", _refuse):
        event.listen(engine, "do_connect", _refuse)
    engine.dispose()


def _refuse(*_: object) -> None:
    raise StoreFailed(
        "The server is shutting down; its index of adapters is closed.",
        field="database_url",
        fix="Send the request again once it has started.",
    )


def _say_what_failed(context: ExceptionContext) -> StoreFailed | None:
    error = context.sqlalchemy_exception
    if context.is_pre_ping:  # the connection is made anew
        return None
    if not isinstance(error, (DatabaseError, InterfaceError)):
        return None
    if isinstance(error, (IntegrityError, ProgrammingError)):
        return None
    # A server's driver tells its address and user, which are no client's business.
    reason = f": {context.original_exception}" if context.dialect.name == "sqlite" else ""
    logger.error("The index of adapters failed: %s", context.original_exception)
    return StoreFailed(
        f"The index of adapters failed{reason}.",
        field="database_url",
        fix="Free space under the server's home, or see to its database.",
    )


def _wait_for_other_connections(connection: Any, _: object) -> None:
    connection.execute("PRAGMA busy_timeout = 30000")
