"""Fields of vLLM's API that are not served, at the values that ask for nothing."""

from typing import Annotated, Any

from dynamic_lora_server.schemas._base import (
    Neutral,
    Unset,
    UnsetOrEmptyList,
    UnsetOrFalse,
    UnsetOrOne,
    Wire,
)

_UnsetOrTrue = Annotated[Any, Neutral(None, True)]
_UnsetOrZero = Annotated[Any, Neutral(None, 0)]


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
