"""`/adapters`: upload, list, inspect, delete."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from dynamic_lora_adapters.archive import Intake
from dynamic_lora_adapters.names import check_adapter_name
from dynamic_lora_adapters.passport import Passport
from dynamic_lora_adapters.registry import Publication
from dynamic_lora_server.problems import parse_body
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, problems
from dynamic_lora_server.schemas.adapters import (
    UPLOAD_BODY,
    Adapter,
    AdapterList,
    AdapterSource,
    Modes,
    Residency,
)
from dynamic_lora_server.sources import fetch_source
from dynamic_lora_server.uploads import (
    JSON,
    MULTIPART,
    Upload,
    drain,
    media_type,
    receive_upload,
)

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/adapters", tags=["adapters"])


@router.post(
    "",
    status_code=201,
    response_model=Adapter,
    responses={
        200: {"description": "The name had this content already", "model": Adapter},
        **problems(400, 409, 413, 415, 422, 502, 503),
    },
    dependencies=[NoQuery],
    openapi_extra=UPLOAD_BODY,
    summary="Upload a LoRA adapter, or name where the server finds it",
)
async def upload(request: Request, runtime: Ready) -> Response:
    """Check the adapter whole and publish it, all or nothing.

    An existing name moves to the new content; requests that run keep the old one.
    """
    kind = media_type(request.headers.get("content-type", ""))
    if kind == MULTIPART:
        publication = await _publish_upload(request, runtime)
    elif kind == JSON:
        source = parse_body(AdapterSource, await request.body())
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


@router.get("", responses=problems(503), summary="List the adapters")
def list_adapters(runtime: Ready) -> AdapterList:
    """The passports of all adapters, by name."""
    adapters = [_adapter(runtime, p) for p in runtime.registry.list()]
    return AdapterList(adapters=adapters, modes=_modes(runtime))


@router.get("/{name}", responses=problems(404, 503), summary="An adapter's passport")
async def get_adapter(name: str, runtime: Ready) -> Adapter:
    """What the server knows about an adapter, and where its weights are now."""
    return _adapter(runtime, runtime.registry.resolve(name).passport)


@router.delete(
    "/{name}", status_code=204, responses=problems(404, 503), summary="Delete an adapter"
)
async def delete_adapter(name: str, state: State, runtime: Ready) -> None:
    """Forget the name at once; requests that use the adapter finish with it."""
    await run_in_threadpool(runtime.registry.delete, name)
    state.metrics.forget(name)


async def publish_source(runtime: "Runtime", source: AdapterSource) -> Publication:
    """Fetch an adapter, check it whole and publish it, all or nothing."""
    _check_name(source.name, runtime)
    async with _staging(runtime) as inbox, _staging(runtime) as folder:
        async with runtime.fetching:
            intake = await run_in_threadpool(_fetch, source, runtime, inbox, folder)
        return await _publish(runtime, source, folder, intake)


async def _publish_upload(request: Request, runtime: "Runtime") -> Publication:
    async with _staging(runtime) as inbox, _staging(runtime) as folder:
        upload = await _receive(request, runtime, inbox)
        _check_name(upload.name, runtime)
        async with runtime.unpacking:
            intake = await run_in_threadpool(_take_in, upload, runtime, folder)
        return await _publish(runtime, upload, folder, intake)


def _staging(runtime: "Runtime") -> AbstractAsyncContextManager[Path]:
    """A folder for an upload; making and removing it, which takes time, holds up nobody."""
    return contextmanager_in_threadpool(runtime.registry.staging())


def _check_name(name: str, runtime: "Runtime") -> None:
    """Before what takes long; once more when it is published, as it may be given meanwhile."""
    check_adapter_name(name, reserved=runtime.registry.reserved)
    runtime.loader.saved.check_free(name)


async def _receive(request: Request, runtime: "Runtime", inbox: Path) -> Upload:
    chunks = request.stream()
    try:
        return await receive_upload(
            chunks,
            content_type=request.headers["content-type"],
            inbox=inbox,
            max_bytes=runtime.config.max_upload_bytes,
        )
    except Exception:
        await drain(chunks)
        raise


def _take_in(upload: Upload, runtime: "Runtime", folder: Path) -> Intake:
    intake = Intake(folder, runtime.registry.limits)
    for file in upload.files:
        with file.path.open("rb") as stream:
            intake.add(file.filename, stream)
    return intake


def _fetch(source: AdapterSource, runtime: "Runtime", inbox: Path, folder: Path) -> Intake:
    intake = Intake(folder, runtime.registry.limits)
    fetch_source(
        source.source,
        intake,
        roots=runtime.config.adapter_roots,
        inbox=inbox,
        max_bytes=runtime.config.max_upload_bytes,
    )
    return intake


async def _publish(
    runtime: "Runtime", wanted: Upload | AdapterSource, folder: Path, intake: Intake
) -> Publication:
    def publish() -> Publication:
        runtime.loader.saved.check_free(wanted.name)
        return runtime.registry.publish(
            wanted.name, folder, force=wanted.force, ignored_files=intake.ignored_files
        )

    async with runtime.checking:
        return await run_in_threadpool(publish)


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
