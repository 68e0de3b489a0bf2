"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters as vLLM's operators change them.

What controllers of clusters ask of a vLLM server that may load adapters while it runs. The same as
`POST /adapters` with a source, and `DELETE /adapters/{name}`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from dynamic_lora_adapters.errors import AdapterError
from dynamic_lora_server.errors import InvalidParameter, ServerError
from dynamic_lora_server.intake.publishing import publish_source
from dynamic_lora_server.intake.sources import source_of
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, StrictRoute, openai_errors
from dynamic_lora_server.schemas.adapters import (
    AdapterSource,
    LoadLoraAdapter,
    UnloadLoraAdapter,
)

_FIELDS = {"name": "lora_name", "adapter": "lora_name", "source": "lora_path"}

router = APIRouter(prefix="/v1", tags=["adapters"], route_class=StrictRoute)


@router.post(
    "/load_lora_adapter",
    responses=openai_errors(400, 413, 415, 502, 503),
    dependencies=[NoQuery],
    summary="Load an adapter from a folder or the Hub, as vLLM does",
)
async def load_lora_adapter(asked: LoadLoraAdapter, runtime: Ready) -> PlainTextResponse:
    """Check the adapter whole and publish it. A name that is there needs `load_inplace`."""
    name, replace = asked.lora_name, asked.load_inplace
    if runtime.registry.has(name) and not replace:
        raise _already_loaded(name)
    roots = runtime.config.adapter_roots
    path = await run_in_threadpool(source_of, asked.lora_path, roots)
    source = AdapterSource(name=name, source=path)
    with _own_fields():
        publication = await publish_source(runtime, source, replace=replace)
    if not publication.created and not replace:  # another was faster, while this one was fetched
        raise _already_loaded(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    responses=openai_errors(400, 404, 413, 415, 503),
    dependencies=[NoQuery],
    summary="Forget an adapter, as vLLM does",
)
async def unload_lora_adapter(
    asked: UnloadLoraAdapter, state: State, runtime: Ready
) -> PlainTextResponse:
    """Forget the name at once; requests that use the adapter finish with it."""
    name = asked.lora_name
    with _own_fields():
        await run_in_threadpool(runtime.saved.delete_adapter, name)
    state.metrics.forget(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _already_loaded(name: str) -> InvalidParameter:
    return InvalidParameter(
        f"The lora adapter {name!r} has already been loaded.",
        field="lora_name",
        fix="Set load_inplace to true to give the name other content.",
    )


@contextmanager
def _own_fields() -> Iterator[None]:
    """Have errors name the fields of these bodies, not those of `POST /adapters`."""
    try:
        yield
    except (AdapterError, ServerError) as error:
        error.field = _FIELDS.get(error.field or "", error.field)
        raise
