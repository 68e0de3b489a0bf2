"""`POST /v1/chat/completions`: OpenAI's chat completions."""

import asyncio
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_adapters.composition import Composition
from dynamic_lora_server.answers.chat import ChatAnswer
from dynamic_lora_server.answers.openai import framed
from dynamic_lora_server.disconnect import until_disconnect
from dynamic_lora_server.generation import GenerationSpec
from dynamic_lora_server.prompts import chat_adapter_name, chat_spec
from dynamic_lora_server.routes._deps import (
    NoQuery,
    Ready,
    State,
    StrictRoute,
    event_stream,
    openai_errors,
)
from dynamic_lora_server.schemas.openai import ChatCompletion, ChatRequest
from dynamic_lora_server.sse import EventStream
from dynamic_lora_server.state import ServerState
from dynamic_lora_server.streams import Generation, begin, collect

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute, dependencies=[NoQuery])


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": event_stream("ChatChunk")},
        **openai_errors(400, 404, 413, 415, 429, 500, 503),
    },
    summary="Answer a conversation",
)
async def chat(body: ChatRequest, request: Request, state: State, runtime: Ready) -> Response:
    """The messages go through the chat template of the adapter, if it is one alone and has one,
    or through the base model's; task cards are not applied."""
    if not body.stream:
        return await until_disconnect(request.receive, _whole(body, state, runtime))
    generation, spec = await until_disconnect(request.receive, _begun(body, state, runtime))
    return EventStream(framed(_answer(body, spec).stream(generation)))


async def _whole(body: ChatRequest, state: ServerState, runtime: "Runtime") -> Response:
    generation, spec = await _begun(body, state, runtime)
    answer = _answer(body, spec).whole(await collect(generation))
    return Response(answer.model_dump_json(), media_type="application/json")


async def _begun(
    body: ChatRequest, state: ServerState, runtime: "Runtime"
) -> tuple[Generation, GenerationSpec]:
    """A generation that was admitted, with the version by whose template it was rendered."""
    saved = runtime.residencies.saved
    while True:
        name = chat_adapter_name(body.model, model_id=runtime.model_id, known=saved.has)
        adapter = Composition() if name is None else saved.resolve(name)
        versions = [saved.version(part) for part in adapter.parts]
        # Rendering and tokenising a long conversation would hold up everybody's streams.
        spec = await asyncio.to_thread(
            chat_spec,
            body,
            adapter=adapter,
            tokenizer=runtime.tokenizer,
            view=runtime.view,
            chat=None if adapter.alone is None else versions[0].chat,
        )
        generation = await begin(state.generate(spec))
        rendered = adapter.digest([found.digest for found in versions]) if versions else None
        if generation.started.version == rendered:
            return generation, spec
        await generation.events.aclose()  # it was replaced in between


def _answer(body: ChatRequest, spec: GenerationSpec) -> ChatAnswer:
    return ChatAnswer(
        model=body.model,
        n=spec.n,
        logprobs=spec.sampling.logprobs,
        usage=bool(body.stream_options and body.stream_options.include_usage),
    )
