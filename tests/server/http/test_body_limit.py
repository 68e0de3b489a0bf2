"""How much of bodies may be in memory."""

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.http.body_limit import BodyLimit
from tests.support.eventually import eventually


async def test_bodies_count_until_their_requests_are_answered() -> None:
    """Meanwhile they wait to be parsed, to be rendered and to run, in memory."""
    answering, num_read = asyncio.Event(), 0

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        nonlocal num_read
        num_read += len((await receive())["body"])
        await answering.wait()

    async def arrive() -> Message:
        return {"type": "http.request", "body": b" " * 100, "more_body": False}

    async def send(_message: Message) -> None:
        raise AssertionError("nothing is answered in this test")

    limit = BodyLimit(app, max_bytes=100)
    scope = {"type": "http", "path": "/generate", "headers": []}
    waiting = [asyncio.create_task(limit(scope, arrive, send)) for _ in range(64)]
    await eventually(lambda: num_read == 6400, "all bodies have been read")
    with pytest.raises(QueueFull, match="Bodies of 6,500 bytes in all are on their way or not"):
        await asyncio.wait_for(limit(scope, arrive, send), 60)
    answering.set()
    await asyncio.gather(*waiting)
    await limit(scope, arrive, send)
