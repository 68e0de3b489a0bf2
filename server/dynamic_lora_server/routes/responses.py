"""`POST /v1/responses`: OpenAI's responses, of which nothing is stored."""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_server.answers.responses import ResponseAnswer
from dynamic_lora_server.answers.streams import Prepared, begin_prepared, collect
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.http.sse import EventStream
from dynamic_lora_server.requests.response_chat import chat_of
from dynamic_lora_server.routes._conversation import rendered
from dynamic_lora_server.routes._deps import (
    NoQuery,
    Ready,
    State,
    StrictRoute,
    openai_errors,
    typed_event_stream,
)
from dynamic_lora_server.schemas.responses import ResponseRequest
from dynamic_lora_server.schemas.responses_answers import ResponseObject
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute, dependencies=[NoQuery])


@router.post(
    "/responses",
    response_model=ResponseObject,
    responses={
        200: {"content": typed_event_stream("ResponseEvent")},
        **openai_errors(400, 404, 413, 415, 429, 500, 502, 503),
    },
    summary="Answer a conversation that is made of items",
)
async def respond(
    body: ResponseRequest, request: Request, state: State, runtime: Ready
) -> Response:
    """The items go through the chat template as the messages of `/v1/chat/completions` do."""
    if not body.stream:
        return await until_disconnect(request.receive, _whole(body, state, runtime))
    begun = begin_prepared(partial(_prepare, body, state, runtime), state.generate)
    generation, answer = await until_disconnect(request.receive, begun)
    return EventStream(answer.stream(generation, state.write))


async def _whole(body: ResponseRequest, state: ServerState, runtime: "Runtime") -> Response:
    generation, answer = await begin_prepared(
        partial(_prepare, body, state, runtime), state.generate
    )
    (continuation,) = await collect(generation)

    def written() -> str:
        return answer.whole(continuation).model_dump_json()

    content = await state.write(written) if body.include else written()
    return Response(content, media_type="application/json")


async def _prepare(
    body: ResponseRequest, state: ServerState, runtime: "Runtime"
) -> Prepared[ResponseAnswer]:
    asked = await rendered(
        body.model, partial(chat_of, body), num_answers=1, state=state, runtime=runtime
    )
    answer = ResponseAnswer(
        body, model=asked.model, logprobs=asked.spec.sampling.logprobs, offer=asked.offer
    )
    return Prepared(asked.spec, answer, asked.version)
