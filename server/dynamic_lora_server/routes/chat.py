"""`POST /v1/chat/completions`: OpenAI's chat completions."""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_server.answers.chat import ChatAnswer
from dynamic_lora_server.answers.openai import UsageTold, framed
from dynamic_lora_server.answers.streams import Prepared, begin_prepared, collect
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.http.sse import EventStream
from dynamic_lora_server.routes._conversation import rendered
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
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute, dependencies=[NoQuery])


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": event_stream("ChatChunk")},
        **openai_errors(400, 404, 413, 415, 429, 500, 502, 503),
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
    continuations = await collect(generation)

    def written() -> str:
        return answer.whole(continuations).model_dump_json()

    content = await state.write(written) if body.logprobs else written()
    return Response(content, media_type="application/json")


async def _prepare(
    body: ChatRequest, state: ServerState, runtime: "Runtime"
) -> Prepared[ChatAnswer]:
    asked = await rendered(
        body.model, lambda: body, num_answers=body.n or 1, state=state, runtime=runtime
    )
    answer = ChatAnswer(
        offer=asked.offer,
        model=asked.model,
        fingerprint=runtime.fingerprint,
        n=asked.spec.n,
        logprobs=asked.spec.sampling.logprobs,
        usage=UsageTold.of(body.stream_options),
    )
    return Prepared(asked.spec, answer, asked.version)
