"""`POST /v1/chat/completions`: OpenAI's chat completions."""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_server.answers.chat import ChatAnswer
from dynamic_lora_server.answers.openai import framed
from dynamic_lora_server.disconnect import until_disconnect
from dynamic_lora_server.generation import GenerationSpec
from dynamic_lora_server.prompts import chat_spec
from dynamic_lora_server.routes._deps import (
    NoQuery,
    Ready,
    State,
    StrictRoute,
    event_stream,
    openai_errors,
)
from dynamic_lora_server.schemas.openai import ChatRequest
from dynamic_lora_server.schemas.openai_answers import ChatCompletion
from dynamic_lora_server.selection import select_chat
from dynamic_lora_server.sse import EventStream
from dynamic_lora_server.state import ServerState
from dynamic_lora_server.streams import Prepared, begin_prepared, collect

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
    begun = begin_prepared(partial(_prepare, body, state, runtime), state.generate)
    generation, answer = await until_disconnect(request.receive, begun)
    return EventStream(framed(answer.stream(generation)))


async def _whole(body: ChatRequest, state: ServerState, runtime: "Runtime") -> Response:
    generation, answer = await begin_prepared(
        partial(_prepare, body, state, runtime), state.generate
    )
    whole = answer.whole(await collect(generation))
    return Response(whole.model_dump_json(), media_type="application/json")


async def _prepare(
    body: ChatRequest, state: ServerState, runtime: "Runtime"
) -> Prepared[ChatAnswer]:
    saved = runtime.loader.saved
    runtime.service.check_room(body.n or 1)
    asked = select_chat(body.model, saved=saved, base_names=runtime.base_names)
    make = partial(
        chat_spec, body, adapter=asked.adapter, tokenizer=runtime.tokenizer, chat=asked.chat
    )
    spec = await state.render(make)
    name = runtime.name_of_base(body.model) if asked.adapter.is_base else body.model
    return Prepared(spec, _answer(body, spec, name), asked.digest)


def _answer(body: ChatRequest, spec: GenerationSpec, model: str) -> ChatAnswer:
    return ChatAnswer(
        model=model,
        n=spec.n,
        logprobs=spec.sampling.logprobs,
        usage=bool(body.stream_options and body.stream_options.include_usage),
    )
