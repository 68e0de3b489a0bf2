"""The answer of `POST /v1/responses`, in the shape of OpenAI's Responses API."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from dynamic_lora_server.schemas._base import Answer
from dynamic_lora_server.schemas.openai_answers import ChatLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Answer):
    """The text of a message, and its log-probabilities, if they are asked for."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: Sequence[ChatLogprob] = ()


class OutputMessage(Answer):
    """What the model says."""

    type: Literal["message"] = "message"
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputCall(Answer):
    """A call that the model asks for, and its arguments as JSON text."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(Answer):
    """Of the prompt's tokens, those that were found in the prefix cache and not computed.

    Nobody asks for tokens to be written there, and none are charged for.
    """

    cached_tokens: int
    cache_write_tokens: Literal[0] = 0


class OutputTokensDetails(Answer):
    """A model's thoughts, if it has any, are a part of its text."""

    reasoning_tokens: Literal[0] = 0


class ResponseUsage(Answer):
    """Token counts of one request."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an answer was cut off."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(Answer):
    """Why a stream broke off."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class NoReasoning(Answer):
    """What a request that asks for none asks for."""

    effort: None = None
    summary: None = None


class ResponseObject(Answer):
    """The answer of `POST /v1/responses`, and what its streams say of it.

    Beside its `output` it repeats the request, with the defaults of what that leaves out.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: NoReasoning = NoReasoning()
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any] = Field(description="As in the request.")
    tool_choice: str | dict[str, Any] = Field(description="As in the request.")
    tools: list[dict[str, Any]] = Field(description="As in the request.")
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
