"""`POST /v1/completions`: OpenAI's completions."""

from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_server.answers.completions import CompletionAnswer
from dynamic_lora_server.answers.openai import UsageTold, framed
from dynamic_lora_server.answers.streams import Generation, begin_all, close_all, collect_all
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import MAX_PROMPT_LOGPROBS, GenerationSpec
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.http.sse import EventStream
from dynamic_lora_server.requests.prompts import completion_specs
from dynamic_lora_server.requests.selection import openai_adapter_name
from dynamic_lora_server.routes._deps import (
    NoQuery,
    Ready,
    State,
    StrictRoute,
    event_stream,
    openai_errors,
)
from dynamic_lora_server.schemas.openai import CompletionRequest
from dynamic_lora_server.schemas.openai_answers import Completion
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute, dependencies=[NoQuery])


@router.post(
    "/completions",
    response_model=Completion,
    responses={
        200: {"content": event_stream("Completion")},
        **openai_errors(400, 404, 413, 415, 429, 500, 502, 503),
    },
    summary="Complete prompts",
)
async def complete(
    body: CompletionRequest, request: Request, state: State, runtime: Ready
) -> Response:
    """The prompts go to the model as they are: no task card, no chat template."""
    known = runtime.saved.has
    adapter = openai_adapter_name(body.model, base_names=runtime.base_names, known=known)
    specs = completion_specs(body, adapter=adapter)
    _check_room(specs, runtime.service.places.capacity)
    begun = _begun(body, specs, state, runtime)
    if not body.stream:
        return await until_disconnect(request.receive, _whole(body, begun, state))
    generations, answer = await until_disconnect(request.receive, begun)
    return EventStream(framed(answer.stream(generations)))


def _check_room(specs: list[GenerationSpec], capacity: int) -> None:
    """What an empty server could not take either is no case of too many requests."""
    wanted = sum(spec.n for spec in specs)
    if wanted > capacity:
        raise InvalidParameter(
            f"{len(specs)} prompts with n = {specs[0].n} are {wanted} continuations; the server "
            f"takes {capacity} at a time.",
            field="prompt",
            fix="Send the prompts in several requests.",
        )


def _check_told(specs: list[GenerationSpec], generations: list[Generation]) -> None:
    """How many log-probabilities of prompts are to be given back, once these are tokens."""
    wanted = sum(
        spec.n * generation.started.num_prompt_tokens * (1 + spec.sampling.top_logprobs)
        for spec, generation in zip(specs, generations, strict=True)
        if spec.sampling.prompt_logprobs
    )
    if wanted > MAX_PROMPT_LOGPROBS:
        raise InvalidParameter(
            f"echo and logprobs ask for {wanted} log-probabilities of prompts; the server gives "
            f"{MAX_PROMPT_LOGPROBS} back at a time.",
            field="logprobs",
            fix="Send the prompts in several requests, or lower n or logprobs.",
        )


async def _whole(
    body: CompletionRequest,
    begun: Awaitable[tuple[list[Generation], CompletionAnswer]],
    state: ServerState,
) -> Response:
    generations, answer = await begun
    continuations = await collect_all(generations)

    def written() -> str:
        return answer.whole(continuations).model_dump_json()

    content = written() if body.logprobs is None else await state.write(written)
    return Response(content, media_type="application/json")


async def _begun(
    body: CompletionRequest, specs: list[GenerationSpec], state: ServerState, runtime: "Runtime"
) -> tuple[list[Generation], CompletionAnswer]:
    """Generations that were admitted, one for each prompt."""
    runtime.service.places.check(sum(spec.n for spec in specs))
    adapter = specs[0].adapter
    if isinstance(adapter, str):
        await state.hub.found(partial(runtime.saved.resolve, adapter))
    generations = await begin_all([state.generate(spec) for spec in specs])
    try:
        _check_told(specs, generations)
    except InvalidParameter:
        await close_all([generation.events for generation in generations])
        raise
    is_base = generations[0].started.adapter is None  # also where a sum cancels out
    answer = CompletionAnswer(
        model=runtime.name_of_base(body.model) if is_base else body.model,
        fingerprint=runtime.fingerprint,
        n=body.n or 1,
        logprobs=body.logprobs is not None,
        only_prompt=body.max_tokens == 0,
        usage=UsageTold.of(body.stream_options),
    )
    return generations, answer
