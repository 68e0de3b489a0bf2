"""`POST /v1/chat/completions`: OpenAI's chat completions."""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_server.answers.chat import ChatAnswer
from dynamic_lora_server.answers.openai import UsageTold, framed
from dynamic_lora_server.answers.streams import Prepared, begin_prepared, collect
from dynamic_lora_server.generation import GenerationSpec
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.http.sse import EventStream
from dynamic_lora_server.requests.prompts import chat_offer, chat_spec
from dynamic_lora_server.requests.selection import ChatAdapter, select_chat
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
from dynamic_lora_server.tools.offer import Offer

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
    saved = runtime.loader.saved
    runtime.service.places.check(body.n or 1)
    asked = await state.hub.found(
        partial(select_chat, body.model, saved=saved, base_names=runtime.base_names)
    )
    spec, offer = await state.render(partial(_rendered, body, asked, runtime))
    name = runtime.name_of_base(body.model) if asked.adapter.is_base else body.model
    answer = _answer(body, spec, offer, model=name, fingerprint=runtime.fingerprint)
    return Prepared(spec, answer, asked.digest)


def _rendered(
    body: ChatRequest, asked: ChatAdapter, runtime: "Runtime"
) -> tuple[GenerationSpec, Offer | None]:
    tokenizer, chat = runtime.tokenizer, asked.chat
    offer = chat_offer(
        body,
        tokenizer=tokenizer,
        view=runtime.view,
        otherwise=runtime.config.tool_call_format,
        chat=chat,
    )
    spec = chat_spec(body, adapter=asked.adapter, tokenizer=tokenizer, chat=chat, offer=offer)
    return spec, offer


def _answer(
    body: ChatRequest,
    spec: GenerationSpec,
    offer: Offer | None,
    *,
    model: str,
    fingerprint: str,
) -> ChatAnswer:
    return ChatAnswer(
        offer=offer,
        model=model,
        fingerprint=fingerprint,
        n=spec.n,
        logprobs=spec.sampling.logprobs,
        usage=UsageTold.of(body.stream_options),
    )
