"""Fields of OpenAI's and vLLM's APIs that are not served, at the values that ask for nothing."""

from typing import Annotated, Any

from dynamic_lora_server.schemas._base import (
    Neutral,
    Unset,
    UnsetOrEmptyList,
    UnsetOrEmptyMap,
    UnsetOrFalse,
    UnsetOrOne,
    Wire,
)

_UnsetOrTrue = Annotated[Any, Neutral(None, True)]
_UnsetOrZero = Annotated[Any, Neutral(None, 0)]
_SEND_ITEMS = "nothing is stored: send the items of earlier turns in input"
_Stored = Annotated[Any, Neutral(None, fix=_SEND_ITEMS)]


class UnservedSampling(Wire):
    """Of completions and chat completions."""

    allowed_token_ids: UnsetOrEmptyList = None
    bad_words: UnsetOrEmptyList = None
    cache_salt: Unset = None
    kv_transfer_params: Unset = None
    length_penalty: UnsetOrOne = None
    logits_processors: UnsetOrEmptyList = None
    priority: _UnsetOrZero = None
    prompt_logprobs: Unset = None
    return_token_ids: UnsetOrFalse = None
    return_tokens_as_token_ids: UnsetOrFalse = None
    skip_special_tokens: _UnsetOrTrue = None
    # Without special tokens in the text there is nothing between them.
    spaces_between_special_tokens: Annotated[Any, Neutral(None, True, False)] = None
    truncate_prompt_tokens: Unset = None
    use_beam_search: UnsetOrFalse = None
    vllm_xargs: Unset = None


class UnservedCompletion(UnservedSampling):
    """Of completions alone."""

    add_special_tokens: _UnsetOrTrue = None


class UnservedChat(UnservedSampling):
    """Of chat completions alone."""

    add_special_tokens: UnsetOrFalse = None
    best_of: UnsetOrOne = None
    chat_template: Unset = None
    documents: UnsetOrEmptyList = None
    echo: UnsetOrFalse = None
    include_reasoning: _UnsetOrTrue = None
    mm_processor_kwargs: Unset = None


class Reasoning(Wire):
    """Of a response: none is asked for."""

    effort: Annotated[Any, Neutral(None, "none")] = None
    summary: Unset = None
    generate_summary: Unset = None
    context: Annotated[Any, Neutral(None, "auto")] = None
    mode: Annotated[Any, Neutral(None, "standard")] = None


class UnservedResponse(Wire):
    """Of responses alone, OpenAI's and vLLM's."""

    access_programs: UnsetOrEmptyMap = None
    background: UnsetOrFalse = None
    background_options: UnsetOrEmptyMap = None
    cache_salt: Unset = None
    context_management: UnsetOrEmptyList = None
    conversation: _Stored = None
    enable_response_messages: UnsetOrFalse = None
    image: UnsetOrEmptyMap = None
    max_tool_calls: Unset = None
    mm_processor_kwargs: Unset = None
    moderation: Unset = None
    previous_input_messages: Unset = None
    previous_response: _Stored = None
    previous_response_id: _Stored = None
    priority: _UnsetOrZero = None
    prompt: Unset = None
    prompt_cache_options: UnsetOrEmptyMap = None
    prompt_cache_retention: Unset = None
    reasoning: Reasoning | None = None
    request_id: Unset = None
    skip_special_tokens: _UnsetOrTrue = None
    store: Annotated[
        Any, Neutral(None, False, fix="nothing is stored: leave it out or send false")
    ] = None
    truncation: Annotated[
        Any, Neutral(None, "disabled", fix="leave it out, and send what the context holds")
    ] = None
    vllm_xargs: Unset = None
