"""A conversation on its way to the service, for the routes that answer one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dynamic_lora_server.generation import GenerationSpec
from dynamic_lora_server.requests.prompts import chat_offer, chat_spec
from dynamic_lora_server.requests.selection import ChatAdapter, select_chat
from dynamic_lora_server.schemas.openai import ChatRequest
from dynamic_lora_server.state import ServerState
from dynamic_lora_server.tools.offer import Offer

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a conversation asks for, and of whom: `model` as the answer names it, in a version."""

    spec: GenerationSpec
    offer: Offer | None
    model: str
    version: str | None  # None: the base model


async def rendered(
    model: str,
    chat: Callable[[], ChatRequest],
    *,
    num_answers: int,
    state: ServerState,
    runtime: "Runtime",
) -> Rendered:
    """What a `chat` asks of a `model`; it is made and rendered on a thread, if there is a place
    for its answers.

    Raises what refuses it: QueueFull, what `select_chat`, `chat_offer` and `chat_spec` do, and
    what making it raises.
    """
    runtime.service.places.check(num_answers)
    select = partial(select_chat, model, saved=runtime.saved, base_names=runtime.base_names)
    asked = await state.hub.found(select)
    spec, offer = await state.render(lambda: _specified(chat(), asked, runtime))
    name = runtime.name_of_base(model) if asked.adapter.is_base else model
    return Rendered(spec, offer, name, asked.digest)


def _specified(
    body: ChatRequest, asked: ChatAdapter, runtime: "Runtime"
) -> tuple[GenerationSpec, Offer | None]:
    tokenizer, chat = runtime.tokenizer, asked.chat
    offer = chat_offer(
        body,
        tokenizer=tokenizer,
        view=runtime.view,
        otherwise=runtime.config.tool_call_format,
        adapter=asked.adapter,
        chat=chat,
    )
    spec = chat_spec(body, adapter=asked.adapter, tokenizer=tokenizer, chat=chat, offer=offer)
    return spec, offer
