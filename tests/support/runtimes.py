"""Whole servers around the tiny base: real engine, real store, no HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.generation import (
    Finish,
    GenerationEvent,
    GenerationSpec,
    SamplingParams,
    TokenPiece,
)
from dynamic_lora_server.runtime import Runtime
from tests.support.eventually import eventually
from tests.support.models import save_tiny_base
from tests.support.uploads import copy_adapter


def tiny_config(folder: Path, **changes: Any) -> ServerConfig:
    """Options of a server with a tiny base, saved below `folder` if it is not there yet."""
    base = folder / "base"
    if not base.exists():
        save_tiny_base(base)
    options: dict[str, Any] = {
        "model": str(base),
        "home": folder / "home",
        "kv_memory": 2**22,
        "adapter_memory": 2**22,
        "max_running": 8,
        "max_waiting": 16,
        "prefill_chunk": 64,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return ServerConfig(**options | changes)


def load_runtime(folder: Path, **changes: Any) -> Runtime:
    """A loaded server with no shipped adapters; `start` and `close` are the caller's."""
    shipped = folder / "shipped"
    shipped.mkdir(exist_ok=True)
    return Runtime.load(tiny_config(folder, **changes), shipped=shipped)


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[Runtime]:
    """A running server; checks at the end that nothing is left behind."""
    runtime = load_runtime(folder, **changes)
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.close()
    runtime.built.engine.scheduler.check_integrity()
    runtime.built.pool.check_integrity()
    # A thread may have brought an adapter meanwhile for a request that had gone; the loop, which
    # could not run while the server closed, takes it back.
    await eventually(lambda: not runtime.stats().adapters.num_leased, "no adapter is leased")


def publish(runtime: Runtime, name: str, source: Path) -> str:
    """Give a PEFT folder a name; returns its digest."""
    with runtime.registry.staging() as folder:
        copy_adapter(source, folder)
        return runtime.registry.publish(name, folder).passport.version


def spec(prompt: str | tuple[int, ...] = "the king", **fields: Any) -> GenerationSpec:
    """A request for eight tokens, end of sequence ignored, unless `fields` say otherwise.

    Names of sampling parameters go into the sampling.
    """
    own = {key: fields.pop(key) for key in list(fields) if key in GenerationSpec.__slots__}
    sampling = SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True} | fields)
    return GenerationSpec(prompt=prompt, sampling=sampling, **own)


async def collect(runtime: Runtime, request: GenerationSpec) -> list[GenerationEvent]:
    """All events of a request."""
    return [event async for event in runtime.service.stream(request)]


def token_ids(events: list[GenerationEvent], index: int = 0) -> list[int]:
    """The tokens of one continuation."""
    return [e.token_id for e in events if isinstance(e, TokenPiece) and e.index == index]


def finishes(events: list[GenerationEvent]) -> dict[int, Finish]:
    """The end of each continuation."""
    return {e.index: e for e in events if isinstance(e, Finish)}
