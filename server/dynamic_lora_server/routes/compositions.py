"""`/compositions`: weighted sums of adapters, saved under names of their own."""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from dynamic_lora_adapters.compositions.composition import Part
from dynamic_lora_adapters.compositions.text import parse, parse_parts
from dynamic_lora_adapters.errors import AdapterNotFound
from dynamic_lora_adapters.home.index import StoredComposition
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.requests.selection import weighted_parts
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, StrictRoute, problems
from dynamic_lora_server.schemas.compositions import (
    CompositionList,
    CompositionPart,
    NewComposition,
    SavedComposition,
)

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(
    prefix="/compositions",
    tags=["compositions"],
    route_class=StrictRoute,
    dependencies=[NoQuery],
)


@router.put(
    "/{name:name}",
    response_model=SavedComposition,
    responses={
        201: {"description": "The name is new", "model": SavedComposition},
        **problems(400, 404, 409, 413, 415, 422, 429, 502, 503),
    },
    summary="Save a composition under a name",
)
async def save(
    name: str, body: NewComposition, request: Request, state: State, runtime: Ready
) -> Response:
    """From now on the name can be used like an adapter's.

    A part without a version follows its adapter; the parts are adapters, not
    saved compositions. Those that are not here are fetched from the Hub, if the
    server does so for requests. An existing composition is replaced; requests
    that run keep the old one.
    """
    saved, parts, reserved = runtime.saved, _parts(body), runtime.registry.reserved
    check = partial(saved.check, name, parts, reserved=reserved)
    await until_disconnect(request.receive, state.hub.found(check))
    async with runtime.checking:
        stored, created = await run_in_threadpool(saved.save, name, parts, reserved=reserved)
    return Response(
        _document(runtime, stored).model_dump_json(),
        status_code=201 if created else 200,
        media_type="application/json",
        headers={"location": f"/compositions/{name}"},
    )


@router.get("", responses=problems(422, 503), summary="List the saved compositions")
async def list_compositions(runtime: Ready) -> CompositionList:
    """All saved compositions, by name."""
    saved = runtime.saved.list()
    return CompositionList(compositions=[_document(runtime, one) for one in saved])


@router.get("/{name:name}", responses=problems(404, 422, 503), summary="A saved composition")
async def get_composition(name: str, runtime: Ready) -> SavedComposition:
    """Its text, its parts, and what they are now."""
    return _document(runtime, runtime.saved.get(name))


@router.delete(
    "/{name:name}",
    status_code=204,
    responses=problems(404, 422, 503),
    summary="Delete a composition",
)
async def delete_composition(name: str, runtime: Ready) -> None:
    """Forget the name; its adapters stay, and requests that use it finish with it."""
    await run_in_threadpool(runtime.saved.delete, name)


def _parts(body: NewComposition) -> list[Part]:
    if body.adapter is not None and body.adapters is None:
        return parse_parts(body.adapter)
    if body.adapters is not None and body.adapter is None:
        return weighted_parts(body.adapters)
    raise InvalidParameter(
        "A composition is given as adapter or as adapters, one of the two.",
        field="adapter",
        fix='Send {"adapter": "ner*0.7+tone*0.3"}, for example.',
    )


def _document(runtime: "Runtime", stored: StoredComposition) -> SavedComposition:
    composition = parse(stored.text)
    versions = [_version(runtime, part) for part in composition.parts]
    known = [version for version in versions if version is not None]
    return SavedComposition(
        name=stored.name,
        adapter=stored.text,
        version=composition.digest(known) if len(known) == len(versions) else None,
        parts=[
            CompositionPart(
                name=part.name, pinned=part.version, weight=part.weight, version=version
            )
            for part, version in zip(composition.parts, versions, strict=True)
        ],
        created_at=stored.created_at,
    )


def _version(runtime: "Runtime", part: Part) -> str | None:
    try:
        return runtime.saved.version(part).digest
    except AdapterNotFound:
        return None
