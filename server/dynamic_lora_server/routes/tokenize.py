"""`POST /tokenize` and `POST /detokenize`: texts and conversations as tokens, and back."""

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.http.disconnect import until_disconnect
from dynamic_lora_server.requests.chat_template import render
from dynamic_lora_server.requests.selection import ChatAdapter, openai_adapter_name, select_chat
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, StrictRoute, problems
from dynamic_lora_server.schemas.tokenize import (
    Detokenized,
    DetokenizeRequest,
    SimpleToken,
    TokenCount,
    TokenizeInputs,
    TokenizePrompt,
    TokenizeRequest,
)
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(tags=["tokens"], route_class=StrictRoute, dependencies=[NoQuery])

_ERRORS = problems(400, 404, 413, 415, 422, 429, 502, 503)
_SLICE = 1000  # tokens that are written at once: meanwhile the event loop stands still


@router.post(
    "/tokenize",
    response_model=list[SimpleToken] | TokenCount,
    responses=_ERRORS,
    summary="The tokens of a text or of a conversation",
)
async def tokenize(
    body: TokenizeRequest, request: Request, state: State, runtime: Ready
) -> Response:
    """`inputs` are answered with each token's place, `prompt` and `messages` with their number.

    Messages go through the chat template as `/v1/chat/completions` has it; nothing applies a task
    card.
    """
    check = partial(_check_named, body, runtime)
    work = _worked(check, partial(_tokenized, body, runtime), state)
    return _json(await until_disconnect(request.receive, work))


@router.post(
    "/detokenize",
    response_model=Detokenized,
    responses=_ERRORS,
    summary="The text that tokens stand for",
)
async def detokenize(
    body: DetokenizeRequest, request: Request, state: State, runtime: Ready
) -> Response:
    """Special tokens read as their names, bytes that are no characters as U+FFFD."""
    check = partial(_check_model, body.model, runtime)
    work = _worked(check, partial(_detokenized, body, runtime), state)
    return _json(await until_disconnect(request.receive, work))


async def _worked(
    check: Callable[[], None], work: Callable[[], bytes], state: ServerState
) -> bytes:
    """What `work` makes, once the adapters that `check` misses are here."""
    await state.hub.found(check)
    return await state.tokenize(work)


def _check_named(body: TokenizeRequest, runtime: "Runtime") -> None:
    asked = body.root
    if isinstance(asked, TokenizePrompt):
        _check_model(asked.model, runtime)
    elif not isinstance(asked, TokenizeInputs):
        _chat_adapter(asked.model, runtime)


def _chat_adapter(model: str | None, runtime: "Runtime") -> ChatAdapter:
    return select_chat(model, saved=runtime.saved, base_names=runtime.base_names)


def _tokenized(body: TokenizeRequest, runtime: "Runtime") -> bytes:
    asked, view = body.root, runtime.view
    if isinstance(asked, TokenizeInputs):
        return _places(asked, runtime)
    if isinstance(asked, TokenizePrompt):
        ids = view.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
    else:
        named = _chat_adapter(asked.model, runtime)
        variables = asked.chat_template_kwargs or {}
        text = render(
            asked.messages,
            variables,
            runtime.tokenizer,
            named.chat,
            asked,
            adapter=named.adapter,
        )
        ids = view.encode(text, add_special_tokens=False)
    count = TokenCount.model_construct(
        count=len(ids), max_model_len=runtime.context_length, tokens=list(ids)
    )
    return count.model_dump_json().encode()


def _places(asked: TokenizeInputs, runtime: "Runtime") -> bytes:
    """A list of SimpleToken as JSON."""
    text = asked.inputs
    places = runtime.view.places(text, add_special_tokens=asked.add_special_tokens)
    tokens = (
        {"id": token_id, "text": text[start:stop], "start": start, "stop": stop}
        for token_id, start, stop in places
    )
    written = []
    while some := list(islice(tokens, _SLICE)):
        document = json.dumps(some, ensure_ascii=False, separators=(",", ":"))
        written.append(document[1:-1].encode())
    return b"[%b]" % b",".join(written)


def _detokenized(body: DetokenizeRequest, runtime: "Runtime") -> bytes:
    vocab_size = runtime.view.vocab_size
    if max(body.tokens, default=0) >= vocab_size:
        raise InvalidParameter(
            f"tokens holds a token id outside 0 to {vocab_size - 1}.", field="tokens"
        )
    return Detokenized(prompt=runtime.view.decode(body.tokens)).model_dump_json().encode()


def _check_model(model: str | None, runtime: "Runtime") -> None:
    """The tokenizer is the base's for all; a name that nothing has is refused all the same."""
    saved = runtime.saved
    name = openai_adapter_name(model, base_names=runtime.base_names, known=saved.has)
    if name is not None:
        saved.resolve(name)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
