"""Waiting for what another task or thread brings about.

The deadline is far beyond what a busy machine takes: only what never comes runs into it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

DEADLINE_S = 60.0
_PAUSE_S = 0.01


async def eventually(reached: Callable[[], object | Awaitable[object]], what: str) -> None:
    """Return once `reached` says so; AssertionError with `what` was waited for."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        answer = reached()
        if await answer if isawaitable(answer) else answer:
            return
        assert time.monotonic() < deadline, f"it did not come to this: {what}"
        await asyncio.sleep(_PAUSE_S)


def wait_until(reached: Callable[[], object], what: str) -> None:
    """The same, where there is no event loop."""
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline, f"it did not come to this: {what}"
        time.sleep(_PAUSE_S)
