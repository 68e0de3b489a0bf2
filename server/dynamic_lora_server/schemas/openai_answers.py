"""The answers of `/v1`, in the shapes of OpenAI's API."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from dynamic_lora_server.schemas._base import Answer


class PromptTokensDetails(Answer):
    """Of the prompt's tokens, those that were found in the prefix cache and not computed."""

    cached_tokens: int


class Usage(Answer):
    """Token counts of one request. A prompt is counted once, whatever `n` is.

    Counts of a stream that goes on have no details.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


FinishName = Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(Answer):
    """Log-probabilities in the shape of completions: parallel lists, one entry per token.

    The first token of a prompt that is given back has none. What is in `top_logprobs` is made
    when it is written, for it is the most by far.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: Iterable[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation, or in a stream a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishName | None = None


class Completion(Answer):
    """The answer of `POST /v1/completions`; in a stream, one chunk."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Answer):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The chosen token at a position."""

    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities in the shape of chat completions; each is made when it is written."""

    content: Iterable[ChatLogprob]
    refusal: None = None


class CalledFunction(Answer):
    """What the model calls, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call that the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Answer):
    """The model's turn; `content` is null where it has calls and says nothing."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None

    @model_serializer(mode="wrap")
    def _without_no_calls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        if self.tool_calls is None:
            del written["tool_calls"]
        return written


class ChatChoice(Answer):
    """One continuation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName


class ChatCompletion(Answer):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Answer):
    """What a chunk adds to a call: its name, which comes first, or more of its arguments."""

    name: str | None = None
    arguments: str

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ToolCallDelta(Answer):
    """What a chunk adds to the call of this index; the first has an id and a name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatDelta(Answer):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChunkChoice(Answer):
    """A piece of one continuation."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName | None = None


class ChatChunk(Answer):
    """One server-sent event of a chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(Answer):
    """The base; or, with it as `parent`, an adapter (`root`: its hash) or a sum (its text)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dynamic-lora"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    """The answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(Answer):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Every error below `/v1`."""

    error: ErrorBody
