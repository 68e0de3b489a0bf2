"""The closed loop: a fixed number of clients, each with one request under way at any time."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import aiohttp

from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.stats import Summary, Timing, summarise
from benchmarks.wire import Wire
from benchmarks.workload import PromptMaker, Request, Workload, requests, warm_up_requests

Send = Callable[[Request], Awaitable[Timing]]

# A request of a slow peer at many clients may take minutes; nothing is given up before.
TIMEOUT_S = 1800.0
# Prompts; with answers of 64 tokens, so many are 4,000 tokens a second for half a minute.
_MADE_BEFOREHAND = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """What a closed loop saw: the requests that succeeded, and why the others did not."""

    timings: list[Timing]
    failures: list[str]
    wall_s: float


async def closed_loop(
    send: Send, work: Iterable[Request], *, num_clients: int, seconds: float | None = None
) -> LoopResult:
    """Send `work` from `num_clients` at once; each sends its next when its last has ended.

    Ends when the work is used up, or when `seconds` have passed since the start and a multiple of
    `num_clients` requests was sent: of a server that answers all clients at once only a few would
    otherwise be busy at the end. Requests under way then are finished and counted. The wall time
    runs from the first request's start to the last one's end.
    """
    timings: list[Timing] = []
    failures: list[str] = []
    start = time.perf_counter()
    end = None if seconds is None else start + seconds
    queue = iter(work) if end is None else _in_turns(iter(work), num_clients, end)

    async def client() -> None:
        # The generator is shared and never awaits: each request is taken by one client.
        for request in queue:
            try:
                timings.append(await send(request))
            except RequestFailed as failure:
                failures.append(str(failure))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(client())
    wall_s = time.perf_counter() - start
    return LoopResult(timings=timings, failures=failures, wall_s=wall_s)


def _in_turns(work: Iterator[Request], num_clients: int, end: float) -> Iterator[Request]:
    """`num_clients` requests at a time, as long as `end` has not come."""
    while time.perf_counter() < end:
        turn = list(islice(work, num_clients))
        if not turn:
            return
        yield from turn


def connect(url: str) -> aiohttp.ClientSession:
    """A client for any number of requests at once to the server at `url`.

    aiohttp's parser is C: what reading a stream takes here is taken from the server, which runs on
    the same cores. No connection is kept: one that a server closes while it is idle would fail
    a request.
    """
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
    )


async def send_streaming(http: aiohttp.ClientSession, wire: Wire, request: Request) -> Timing:
    """Post one request and time its tokens.

    Raises RequestFailed: refused, broken off, or not of the length that was asked.
    """
    sent = time.perf_counter()
    arrivals: list[float] = []
    total: int | None = None
    num_tokens = 0
    try:
        async with http.post(
            wire.path, json=wire.body(request), params=wire.params(request)
        ) as response:
            async for event in events_of(response):
                delta = wire.read(event)
                if delta.num_tokens:
                    arrivals.append(time.perf_counter())
                num_tokens += delta.num_tokens
                total = total if delta.total_output_tokens is None else delta.total_output_tokens
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from error
    # The server's own count is right where one event carries several tokens.
    total = num_tokens if total is None else total
    if total != request.num_output_tokens or not arrivals:
        raise RequestFailed(f"{request.num_output_tokens} tokens were asked, {total} came")
    return Timing(
        sent=sent, first_token=arrivals[0], last_token=arrivals[-1], num_output_tokens=total
    )


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of an answer. Raises RequestFailed where there are none."""
    if response.status != 200:
        text = await response.text(errors="replace")
        raise RequestFailed(f"status {response.status}: {text[:300]}")
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        try:
            event = json.loads(data)
        except ValueError as error:
            text = data[:200].decode(errors="replace")
            raise RequestFailed(f"an event is no JSON: {text}") from error
        yield event


async def measure(
    http: aiohttp.ClientSession,
    wire: Wire,
    workload: Workload,
    prompts: PromptMaker,
    *,
    warm_up: Sequence[Request] | None = None,
) -> Summary:
    """Warm up, then run one cell. Raises BenchmarkError where every request failed.

    `warm_up` None is one short request for every client and every adapter.
    """

    async def send(request: Request) -> Timing:
        return await send_streaming(http, wire, request)

    if warm_up is None:
        warm_up = warm_up_requests(workload, prompts)
    warm = await closed_loop(send, warm_up, num_clients=workload.num_clients)
    if warm.failures:
        raise BenchmarkError(f"warm-up failed: {_reasons(warm.failures)}")
    work = islice(requests(workload, prompts), workload.num_requests)
    # Made beforehand, so that making prompts takes no time from the server's processor.
    made = list(islice(work, _MADE_BEFOREHAND))
    result = await closed_loop(
        send,
        chain(made, work),
        num_clients=workload.num_clients,
        seconds=workload.seconds,
    )
    if not result.timings:
        raise BenchmarkError(f"no request succeeded: {_reasons(result.failures)}")
    return summarise(result.timings, wall_s=result.wall_s, num_failed=len(result.failures))


def _reasons(failures: list[str]) -> str:
    return "; ".join(f"{count}x {reason}" for reason, count in Counter(failures).most_common(3))
