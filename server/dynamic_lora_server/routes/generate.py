"""`POST /generate` and `POST /generate_stream`: TGI's and LoRAX's API."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from dynamic_lora_server.answers.streams import Prepared, begin_prepared, collect
from dynamic_lora_server.answers.tgi import TgiAnswer
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import BASE, Started
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.http.sse import EventStream
from dynamic_lora_server.requests.prompts import generate_spec
from dynamic_lora_server.requests.selection import card_of, select
from dynamic_lora_server.routes._deps import Ready, State, StrictRoute, event_stream, problems
from dynamic_lora_server.schemas.generate import GenerateRequest, GenerateResponse
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(tags=["generate"], route_class=StrictRoute)

_ERRORS = problems(400, 404, 413, 415, 422, 429, 500, 502, 503)


class GenerateQuery(BaseModel):
    """What the address of a request may say. An unknown name is refused."""

    model_config = ConfigDict(extra="forbid")

    adapter: str | None = Field(
        default=None,
        description="Task name, or a sum such as `ner*0.7+tone*0.3`; none: the base model.",
    )
    raw: bool = Field(default=False, description="Skip the task card, as `raw` in the body does.")


Asked = Annotated[GenerateQuery, Query()]


@router.post(
    "/generate",
    response_model=GenerateResponse,
    response_model_exclude_none=True,
    responses={200: {"content": event_stream("StreamEvent"), "headers": {}}, **_ERRORS},
    summary="Generate text with an adapter, or with the base model",
)
async def generate(
    body: GenerateRequest, query: Asked, request: Request, state: State, runtime: Ready
) -> Response:
    """The whole text at once, or with `stream` as server-sent events, one for each token."""
    _refuse_repeated(request)
    prepare = partial(_prepare, body, query, state, runtime)
    if body.stream:
        return await _stream(request, state, prepare)
    return await until_disconnect(
        request.receive, _whole(state, prepare, details=bool(body.parameters.details))
    )


@router.post(
    "/",
    response_model=list[GenerateResponse],
    response_model_exclude_none=True,
    responses={200: {"content": event_stream("StreamEvent"), "headers": {}}, **_ERRORS},
    summary="Generate text, for clients that know the server's address alone",
)
async def generate_at_root(
    body: GenerateRequest, query: Asked, request: Request, state: State, runtime: Ready
) -> Response:
    """As `/generate`, in a list of one: what TGI's and LoRAX's own clients ask for."""
    answer = await generate(body, query, request, state, runtime)
    if body.stream:
        return answer
    headers = {name: answer.headers[name] for name in answer.headers if name.startswith("x-")}
    return Response(b"[%b]" % bytes(answer.body), media_type="application/json", headers=headers)


@router.post(
    "/generate_stream",
    response_class=Response,
    responses={
        200: {"description": "One event for each token", "content": event_stream("StreamEvent")},
        **_ERRORS,
    },
    summary="Generate text as server-sent events",
)
async def generate_stream(
    body: GenerateRequest, query: Asked, request: Request, state: State, runtime: Ready
) -> Response:
    """As `/generate` with `stream`; the last event has the whole text."""
    _refuse_repeated(request)
    streamed = body.model_copy(update={"stream": True})
    return await _stream(request, state, partial(_prepare, streamed, query, state, runtime))


def _refuse_repeated(request: Request) -> None:
    """A query that says one thing twice; the framework would take the last."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in GenerateQuery.model_fields:
        if names.count(name) > 1:
            fixes = {"adapter": "Name one adapter, or a sum such as adapter=a*0.5+b*0.5."}
            raise InvalidParameter(
                f"{name} is given more than once in the address.",
                field=name,
                fix=fixes.get(name, "Give it once."),
            )


_Prepare = Callable[[], Awaitable[Prepared[TgiAnswer]]]


async def _prepare(
    body: GenerateRequest, query: GenerateQuery, state: ServerState, runtime: "Runtime"
) -> Prepared[TgiAnswer]:
    saved = runtime.saved
    adapter = await state.hub.found(
        partial(select, query.adapter, body, saved=saved, base_names=runtime.base_names),
        wanted=body.parameters.adapter_source is not None,
    )
    versions = [saved.version(part) for part in adapter.parts]
    card = None if body.raw or query.raw else card_of(adapter, versions)
    spec = generate_spec(body, adapter=adapter, card=card)
    assert isinstance(spec.prompt, str)
    answer = TgiAnswer(
        prefix=spec.prompt if body.parameters.return_full_text else "",
        num_top=body.parameters.top_n_tokens or 0,
        special_ids=runtime.view.special_ids,
    )
    version = None if adapter.is_base else adapter.digest([found.digest for found in versions])
    return Prepared(spec, answer, version)


async def _whole(state: ServerState, prepare: _Prepare, *, details: bool) -> Response:
    generation, answer = await begin_prepared(prepare, state.generate)
    continuations = await collect(generation)

    def written() -> str:
        whole = answer.whole(continuations, details=details)
        return whole.model_dump_json(exclude_none=not details)

    content = await state.write(written) if details else written()
    headers = _headers(generation.started)
    return Response(content, media_type="application/json", headers=headers)


async def _stream(request: Request, state: ServerState, prepare: _Prepare) -> Response:
    begun = begin_prepared(prepare, state.generate)
    generation, answer = await until_disconnect(request.receive, begun)
    return EventStream(answer.stream(generation), _headers(generation.started))


def _headers(started: Started) -> dict[str, str]:
    """Who answered; the base model has no version."""
    if started.adapter is None or started.version is None:
        return {"x-adapter": BASE}
    return {"x-adapter": started.adapter, "x-adapter-version": started.version}
