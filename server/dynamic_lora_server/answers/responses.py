"""Generation events as `/v1/responses` answers them."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from dynamic_lora_server.answers.response_items import ResponseItems, new_id
from dynamic_lora_server.answers.streams import Generation, WholeAnswer
from dynamic_lora_server.generation import Finish, FinishReason, TokenPiece
from dynamic_lora_server.http.problems import openai_error, stream_fault
from dynamic_lora_server.http.sse import event
from dynamic_lora_server.schemas import responses_answers as wire
from dynamic_lora_server.schemas.responses import FunctionTool, NamedFunction, ResponseRequest
from dynamic_lora_server.schemas.responses_events import Event, ProgressKind, ResponseProgress
from dynamic_lora_server.tools.calls import Reader, TextReader
from dynamic_lora_server.tools.offer import Offer

Write = Callable[[Callable[[], bytes]], Awaitable[bytes]]


class ResponseAnswer:
    """Writes the answer to one request, at once or as a stream, and is used for one alone.

    `logprobs` says whether those of the text are wanted, in which case there is no `offer`.
    """

    def __init__(
        self, body: ResponseRequest, *, model: str, logprobs: bool, offer: Offer | None
    ) -> None:
        self._response = _begun(body, model)
        self._with_logprobs = logprobs
        self._with_calls = offer is not None
        self._reader: Reader = TextReader() if offer is None else offer.reader()
        self._items = ResponseItems()

    def whole(self, answer: WholeAnswer) -> wire.ResponseObject:
        """The answer that is sent at once."""
        finish = answer.finish
        pieces = answer.pieces if self._with_logprobs else ()
        for part in [*self._reader.push(finish.text), *self._reader.finish()]:
            self._items.take(part, pieces)
        self._items.end(self._end_of_last(finish))
        return self._ended(finish)

    async def stream(self, generation: Generation, write: Write) -> AsyncGenerator[bytes, None]:
        """The events of the answer; a failure is the last. `write` makes bytes on a thread, which
        takes long with the log-probabilities of all tokens."""
        async with aclosing(generation.events) as events:
            yield self._progress("response.created", self._response)
            yield self._progress("response.in_progress", self._response)
            try:
                if not self._with_calls:
                    yield _framed(self._items.begin_message())
                async for current in events:
                    if isinstance(current, TokenPiece):
                        if told := self._piece(current):
                            yield _framed(told)
                    elif isinstance(current, Finish):
                        last = partial(self._last, current)
                        yield await write(last) if self._with_logprobs else last()
            except Exception as error:
                yield self._failed(error)

    def _piece(self, piece: TokenPiece) -> list[Event]:
        pieces = [piece] if self._with_logprobs else []
        parts = self._reader.push(piece.text)
        return [told for part in parts for told in self._items.take(part, pieces)]

    def _last(self, finish: Finish) -> bytes:
        """What comes after the last piece."""
        parts = [*self._reader.push(finish.tail), *self._reader.finish()]
        told = [told for part in parts for told in self._items.take(part)]
        told += self._items.end(self._end_of_last(finish))
        response = self._ended(finish)
        completed = response.status == "completed"
        kind: ProgressKind = "response.completed" if completed else "response.incomplete"
        return _framed(told) + self._progress(kind, response)

    def _end_of_last(self, finish: Finish) -> wire.ItemStatus:
        """A stop string may cut off a call, which is not whole then, though the answer is."""
        if self._items.calls:
            return "completed" if self._reader.called else "incomplete"
        return "incomplete" if finish.reason is FinishReason.LENGTH else "completed"

    def _ended(self, finish: Finish) -> wire.ResponseObject:
        cut_off = finish.reason is FinishReason.LENGTH
        usage = wire.ResponseUsage(
            input_tokens=finish.num_prompt_tokens,
            input_tokens_details=wire.InputTokensDetails(cached_tokens=finish.num_cached_tokens),
            output_tokens=finish.num_output_tokens,
            total_tokens=finish.num_prompt_tokens + finish.num_output_tokens,
        )
        changes = {
            "status": "incomplete" if cut_off else "completed",
            "completed_at": None if cut_off else int(time.time()),
            "incomplete_details": wire.IncompleteDetails() if cut_off else None,
            "output": self._items.whole,
            "usage": usage,
        }
        return self._response.model_copy(update=changes)

    def _failed(self, error: Exception) -> bytes:
        told = openai_error(stream_fault(error))["error"]
        failure = wire.ResponseFailure(
            code="server_error" if told["type"] == "server_error" else "invalid_prompt",
            message=told["message"],
        )
        changes = {"status": "failed", "error": failure, "output": self._items.whole}
        return self._progress("response.failed", self._response.model_copy(update=changes))

    def _progress(self, kind: ProgressKind, response: wire.ResponseObject) -> bytes:
        number = self._items.next_number()
        return _framed([ResponseProgress(sequence_number=number, type=kind, response=response)])


def _framed(told: Iterable[Event]) -> bytes:
    return b"".join(event(one, one.type) for one in told)


def _begun(body: ResponseRequest, model: str) -> wire.ResponseObject:
    """A response of which nothing is there yet, with what it repeats of its request."""
    return wire.ResponseObject(
        id=new_id("resp"),
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        prompt_cache_key=body.prompt_cache_key,
        safety_identifier=body.safety_identifier,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": _format(body)},
        tool_choice=_tool_choice(body),
        tools=_tools(body.tools or ()),
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
    )


def _format(body: ResponseRequest) -> dict[str, Any]:
    asked = None if body.text is None else body.text.format
    return {"type": "text"} if asked is None else asked.model_dump(by_alias=True, exclude_none=True)


def _tool_choice(body: ResponseRequest) -> str | dict[str, Any]:
    choice = body.tool_choice
    return choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto"


def _tools(tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    fields = {"type", "name", "description", "parameters", "strict"}
    return [tool.model_dump(include=fields) for tool in tools]
