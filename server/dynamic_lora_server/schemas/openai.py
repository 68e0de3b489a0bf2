"""The bodies of `/v1`, in the shapes of OpenAI's API."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
)

from dynamic_lora_server.generation import MAX_N
from dynamic_lora_server.schemas._base import (
    JsonObject,
    Neutral,
    NonEmptyText,
    Text,
    Unset,
    UnsetOrEmptyList,
    UnsetOrEmptyMap,
    UnsetOrFalse,
    UnsetOrOne,
    Wire,
)
from dynamic_lora_server.schemas.generate import LogitBias, StopStrings, StopTokenIds, TokenIds
from dynamic_lora_server.schemas.structured import StructuredRequest
from dynamic_lora_server.schemas.tools import TemplateRequest, ToolCalls, ToolChoice
from dynamic_lora_server.schemas.unserved import UnservedChat, UnservedCompletion


def _unsigned(seed: int) -> int | None:
    """OpenAI's are signed; below 0 stands the unsigned number of the same 64 bits.

    But -1 is none, as in vLLM.
    """
    return None if seed == -1 else seed % 2**64


_Seed = Annotated[int, Field(ge=-(2**63), lt=2**64), AfterValidator(_unsigned)]
_PromptIds = Annotated[TokenIds, Field(min_length=1)]
AnyTier = Annotated[Any, Neutral(None, "auto", "default")]


class StreamOptions(Wire):
    """What a stream carries besides the text."""

    include_usage: bool | None = Field(
        default=None, description="End with one chunk that has `usage`."
    )
    continuous_usage_stats: bool | None = Field(
        default=None,
        description="Every chunk has the `usage` so far. Needs `include_usage`. Not in OpenAI's "
        "API.",
    )
    include_obfuscation: UnsetOrFalse = None


class SamplingFields(Wire):
    """What all routes of OpenAI's that generate share. Null is the same as leaving a field out."""

    model: NonEmptyText = Field(
        description="Task name of an adapter, a sum such as `ner*0.7+tone*0.3`, or a name of "
        "the base model. `tgi` and `dummy`, which TGI's and the Hub's clients send where none is "
        "given, mean the base model too unless something has that name."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Default 1; 0 is greedy."
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(
        default=None, ge=-1, description="0 and -1 are off. Not in OpenAI's API."
    )
    min_p: float | None = Field(default=None, ge=0, le=1, description="Not in OpenAI's API.")
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="Not in OpenAI's API."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(
        default=None, description="What is added to the logits of tokens, by their ids."
    )
    min_tokens: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="Before these neither the end nor a stop token comes. Not in OpenAI's API.",
    )
    seed: _Seed | None = Field(default=None, description="-1 is none.")
    stop: NonEmptyText | StopStrings | None = None
    stop_token_ids: StopTokenIds | None = Field(
        default=None, description="End the text before them. Not in OpenAI's API."
    )
    include_stop_str_in_output: bool | None = Field(
        default=None,
        description="Keep the stop string, or the stop token, at the end of the text. Not in "
        "OpenAI's API.",
    )
    ignore_eos: bool | None = Field(default=None, description="Not in OpenAI's API.")
    stream: bool | None = None
    user: Text | None = Field(
        default=None, description="A label of the caller's own; changes nothing."
    )


class SamplingRequest(StructuredRequest, SamplingFields):
    """What completions and chat completions share."""

    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stream_options: StreamOptions | None = Field(default=None, description="Needs `stream`.")


class CompletionRequest(SamplingRequest, UnservedCompletion):
    """The body of `POST /v1/completions`. The prompt goes to the model as it is."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "base", "prompt": "The capital of France is", "max_tokens": 8}]
        }
    )

    prompt: (
        NonEmptyText
        | Annotated[list[NonEmptyText], Field(min_length=1, max_length=64)]
        | _PromptIds
        | Annotated[list[_PromptIds], Field(min_length=1, max_length=64)]
    ) = Field(description="Text, token ids, or up to 64 of either.")
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="Default 16, or what the context has left. 0 needs `echo`.",
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = Field(
        default=None,
        description="Give the prompt back before each answer; with `logprobs`, those of its "
        "tokens too.",
    )
    best_of: UnsetOrOne = None
    suffix: Annotated[Any, Neutral(None, "")] = None


class TextPart(Wire):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


# Messages of a conversation, and parts of one message: more than contexts have room for.
MAX_MESSAGES = 16_384


def few(what: str) -> BeforeValidator:
    """Refuses a list that is too long before it looks at any of its items."""

    def check(value: object) -> object:
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise ValueError(f"holds {len(value):,} {what}; at most {MAX_MESSAGES:,} are taken")
        return value

    return BeforeValidator(check)


_Parts = Annotated[
    list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), few("parts")
]


class Message(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="`developer` is `system`."
    )
    content: Text | _Parts | None = Field(
        default=None, description="Needed, unless there are `tool_calls`."
    )
    name: Text | None = Field(default=None, description="Of who speaks, for the chat template.")
    reasoning: Text | None = Field(
        default=None,
        description="What a model thought before this turn, for the chat template, as "
        "`reasoning_content`. Most templates leave it out. Not in OpenAI's API.",
    )
    reasoning_content: Text | None = Field(default=None, description="As `reasoning`.")
    parsed: Any = Field(
        default=None,
        description="What OpenAI's client read the content as; changes nothing.",
    )
    refusal: Unset = None
    annotations: UnsetOrEmptyList = None
    tool_calls: ToolCalls | None = Field(default=None, description="The assistant's.")
    tool_call_id: NonEmptyText | None = Field(
        default=None, description="Of the role `tool`: which call the content is the result of."
    )
    function_call: Unset = None
    audio: Unset = None

    @property
    def text(self) -> str:
        """The content as one string: several parts are lines, as in vLLM."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or ())


Messages = Annotated[
    list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), few("messages")
]


class ChatRequest(SamplingRequest, TemplateRequest, UnservedChat):
    """The body of `POST /v1/chat/completions`. The chat template of the
    adapter is applied, if it is one alone and has one, or that of the base model.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "base",
                    "messages": [{"role": "user", "content": "Name three rivers."}],
                    "max_tokens": 32,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: Messages
    max_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="As `max_completion_tokens`."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="Default 1024, or what the context has left."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Needs `logprobs`.")
    chat_template_kwargs: JsonObject | None = Field(
        default=None,
        description="Variables for the chat template, such as `enable_thinking`. Not in OpenAI's "
        "API.",
    )
    prompt_cache_key: Text | None = Field(default=None, description="As `user`.")
    safety_identifier: Text | None = Field(default=None, description="As `user`.")
    tool_choice: ToolChoice | None = Field(
        default=None, description="Default `auto` where there are `tools`."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="False: one call at most. Default true."
    )
    functions: UnsetOrEmptyList = None
    function_call: Annotated[Any, Neutral(None, "none", "auto")] = None
    modalities: Annotated[Any, Neutral(None, ["text"])] = None
    audio: Unset = None
    metadata: UnsetOrEmptyMap = None
    moderation: Unset = None
    prediction: Unset = None
    prompt_cache_options: UnsetOrEmptyMap = None
    prompt_cache_retention: Unset = None
    reasoning_effort: Annotated[Any, Neutral(None, "none")] = None
    service_tier: AnyTier = None
    store: UnsetOrFalse = None
    verbosity: Unset = None
    web_search_options: Unset = None
