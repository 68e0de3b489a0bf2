"""Adapters that are fetched from the Hugging Face Hub at their first request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TypeVar

from dynamic_lora_adapters.compositions.composition import VersionNotFound
from dynamic_lora_adapters.errors import AdapterError, AdapterNotFound
from dynamic_lora_adapters.names import MAX_NAME, NAME
from dynamic_lora_server.errors import InvalidParameter, NotReady, QueueFull, ServerError
from dynamic_lora_server.intake.hub_failures import Failure, HubFailures
from dynamic_lora_server.intake.sources import NotOnHub
from dynamic_lora_server.serving.pace import Pace

T = TypeVar("T")

ALL = "*"
_MOST_FETCHES = 16  # on their way or waiting for their turn

logger = logging.getLogger(__name__)


class HubAdapters:
    """Fetches adapters that the server lacks and requests name by their ids on the Hub.

    Only those of `organisations`, `ALL` for every one; without any, none. `publish` fetches an
    adapter and gives it its id as its name. All who want one wait for the same fetch, which goes
    on when they leave: a client with less patience than the download takes finds it the next
    time. It ends as an adapter or as nothing; after nothing, requests get the same error for a
    while and the Hub is left alone (`HubFailures`, by `clock`). Up to `max_waiting` requests wait.
    Lives on one event loop.
    """

    def __init__(
        self,
        organisations: Collection[str],
        publish: Callable[[str], Awaitable[object]],
        *,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._organisations = frozenset(name.lower() for name in organisations)
        self._publish = publish
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._fetches: dict[str, asyncio.Task[Failure | None]] = {}
        self._failures = HubFailures(clock)
        self._pace = Pace()
        self._ending: NotReady | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for adapters from the Hub."""
        return self._num_waiting

    async def found(self, select: Callable[[], T], *, wanted: bool = False) -> T:
        """What `select` returns, once the adapters that it misses have been fetched.

        Raises what `select` and the check of an adapter raise, AdapterNotFound, SourceUnavailable
        and QueueFull; for an adapter that is not to be fetched InvalidParameter with the reason,
        if the request `wanted` it from the Hub.
        """
        fetched: set[str] = set()
        while True:
            try:
                return select()
            except AdapterNotFound as missing:
                if isinstance(missing, VersionNotFound) or missing.name in fetched:
                    raise
                name, why = missing.name, self._refusal(missing.name)
                if why is not None and not wanted:
                    raise
            if why is not None:
                raise why
            await self._wait_for(name)
            fetched.add(name)

    def give_up(self) -> None:
        """The server ends: fetch no more, and tell those who wait."""
        self._ending = NotReady("The server is shutting down.", fix="Send the request again.")
        for fetch in self._fetches.values():
            fetch.cancel()

    def _refusal(self, name: str) -> InvalidParameter | None:
        """Why an adapter is not fetched from the Hub; None if it is."""
        organisation, slash, _ = name.partition("/")
        if not slash or len(name) > MAX_NAME or not NAME.fullmatch(name):
            return _refused(
                f"{name[:80]!r} is not here, and no id on the Hub, which is organisation/name."
            )
        if not self._organisations:
            return _refused(
                f"{name!r} is not here, and this server was started without --fetch-from-hub.",
                fix="Start it with that option, or upload the adapter under this name.",
            )
        if self._organisations.isdisjoint((ALL, organisation.lower())):
            return _refused(
                f"{name!r} is not here, and this server fetches nothing of {organisation!r} from "
                "the Hub.",
                fix=f"Start it with --fetch-from-hub {organisation} too, or upload the adapter "
                "under this name.",
            )
        return None

    async def _wait_for(self, name: str) -> None:
        self._failures.check(name)
        if self._num_waiting >= self._max_waiting:
            raise self._full(f"{self._num_waiting} requests wait for adapters from the Hub")
        fetch = self._fetches.get(name) or self._begin(name)
        self._num_waiting += 1
        try:
            await asyncio.wait({fetch})  # who is cancelled meanwhile leaves the fetch alone
        finally:
            self._num_waiting -= 1
        if fetch.cancelled():
            assert self._ending is not None
            raise self._ending
        if (failure := fetch.result()) is not None:
            raise failure.told(self._failures.clock())

    def _begin(self, name: str) -> asyncio.Task[Failure | None]:
        if self._ending is not None:
            raise self._ending
        if len(self._fetches) >= _MOST_FETCHES:
            raise self._full(f"{len(self._fetches)} adapters are being fetched from the Hub")
        fetch = self._fetches[name] = asyncio.ensure_future(self._fetch(name))
        fetch.add_done_callback(partial(self._end, name))
        return fetch

    async def _fetch(self, name: str) -> Failure | None:
        began = time.monotonic()
        try:
            await self._publish(name)
        except Exception as error:
            return self._failures.record(name, _of_a_request(name, error))
        self._failures.forget(name)
        self._pace.record(time.monotonic() - began)
        return None

    def _end(self, name: str, fetch: asyncio.Task[Failure | None]) -> None:
        del self._fetches[name]
        if not fetch.cancelled():
            # Also where nobody waits any more.
            failure = fetch.result()
            logger.info(
                "adapter %r from the Hub: %s", name, "fetched" if failure is None else failure.error
            )

    def _full(self, why: str) -> QueueFull:
        return QueueFull(f"{why}; the server takes no more.", retry_after=self._pace.retry_after(1))


def _refused(message: str, *, fix: str | None = None) -> InvalidParameter:
    return InvalidParameter(message, field="parameters.adapter_source", fix=fix)


def _of_a_request(name: str, error: Exception) -> AdapterError | ServerError:
    """What went wrong with a fetch, as who named the adapter is told it."""
    if isinstance(error, NotOnHub):
        return _not_on_hub(name)
    if not isinstance(error, AdapterError | ServerError):
        logger.error("adapter %r from the Hub: an error of the server's", name, exc_info=error)
        return ServerError(
            f"The server met an error of its own while it fetched {name!r}; its log has the "
            "details.",
            field="adapter",
        )
    if error.field in ("name", "source"):  # of `POST /adapters`
        error.field = "adapter"
    return error


def _not_on_hub(name: str) -> AdapterNotFound:
    error = AdapterNotFound(name)
    error.message = (
        f"No adapter is named {name!r}, and the Hub has no such repository, or not for this server."
    )
    error.args = (error.message,)
    error.fix = "Check the name; a private repository needs HF_TOKEN in the server's environment."
    return error
