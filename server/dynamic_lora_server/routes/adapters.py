"""`/adapters`: upload, list, inspect, delete."""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_server.http.problems import parse_body
from dynamic_lora_server.intake.publishing import publish_source, publish_upload
from dynamic_lora_server.intake.uploads import JSON, MULTIPART, media_type
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, problems
from dynamic_lora_server.schemas.adapters import (
    UPLOAD_BODY,
    Adapter,
    AdapterList,
    AdapterSource,
    Modes,
    Residency,
    UnreadableAdapter,
)

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/adapters", tags=["adapters"], dependencies=[NoQuery])


@router.post(
    "",
    status_code=201,
    response_model=Adapter,
    responses={
        200: {"description": "The name had this content already", "model": Adapter},
        **problems(400, 409, 413, 415, 422, 502, 503),
    },
    openapi_extra=UPLOAD_BODY,
    summary="Upload a LoRA adapter, or name where the server finds it",
)
async def upload(request: Request, state: State, runtime: Ready) -> Response:
    """Check the adapter whole and publish it, all or nothing.

    An existing name moves to the new content; requests that run keep the old one.
    """
    content_type = request.headers.get("content-type", "")
    kind = media_type(content_type)
    if kind == MULTIPART:
        publication = await publish_upload(runtime, request.stream(), content_type=content_type)
    elif kind == JSON:
        body = await request.body()
        parse = partial(parse_body, AdapterSource, body)
        source = await state.parse(parse) if state.is_large(body) else parse()
        publication = await publish_source(runtime, source)
    else:
        raise HTTPException(415, f"The body must be {MULTIPART} or {JSON}.")
    adapter = _adapter(runtime, publication.passport)
    return Response(
        adapter.model_dump_json(),
        status_code=201 if publication.created else 200,
        media_type="application/json",
        headers={"location": f"/adapters/{adapter.name}"},
    )


@router.get("", responses=problems(422, 503), summary="List the adapters")
def list_adapters(runtime: Ready) -> AdapterList:
    """The passports of all adapters, by name, and what is here but cannot be read."""
    adapters = [_adapter(runtime, p) for p in runtime.registry.list()]
    unreadable = [
        UnreadableAdapter(name=one.name, version=one.digest, reason=one.why)
        for one in runtime.registry.unreadable()
    ]
    return AdapterList(adapters=adapters, unreadable=unreadable, modes=_modes(runtime))


@router.get("/{name:name}", responses=problems(404, 422, 503), summary="An adapter's passport")
async def get_adapter(name: str, runtime: Ready) -> Adapter:
    """What the server knows about an adapter, and where its weights are now."""
    return _adapter(runtime, runtime.registry.resolve(name).passport)


@router.delete(
    "/{name:name}", status_code=204, responses=problems(404, 422, 503), summary="Delete an adapter"
)
async def delete_adapter(name: str, state: State, runtime: Ready) -> None:
    """Forget the name at once; requests that use the adapter finish with it."""
    await run_in_threadpool(runtime.saved.delete_adapter, name)
    state.metrics.forget(name)


def _adapter(runtime: "Runtime", passport: Passport) -> Adapter:
    tier = runtime.tier(passport.version)
    modes = runtime.built.modes
    residency = Residency(
        tier="device" if tier == "device" else "disk",
        mode="merged" if modes.stats().merged == passport.version else "bypass",
        num_merges=modes.num_switches_to(passport.version),
    )
    return Adapter.model_construct(**dict(passport), residency=residency)


def _modes(runtime: "Runtime") -> Modes:
    stats = runtime.stats()
    modes = stats.modes
    return Modes(
        mode=modes.mode.value,
        merged=modes.merged,
        num_switches=modes.num_switches,
        last_switch_ms=round(modes.last_switch_s * 1000, 3),
        num_merged_tokens=modes.num_merged_rows,
        num_bypass_tokens=modes.num_bypass_rows,
        num_base_tokens=modes.num_base_rows,
        drift=stats.drift,
    )
