"""From a request body to a `GenerationSpec`: task cards, chat templates and defaults.

What decides a parameter of `/generate`: the request, else the adapter's task
card, else the default of `SamplingParams`. The card belongs to `/generate`
alone: `/v1` sends prompts as they are and messages through a chat template, that of
one adapter alone or the base model's, with OpenAI's defaults. A default of
`max_new_tokens` gives way to the context; a number that the request names does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.compositions.composition import Composition
from dynamic_lora_adapters.files.card import CardParameters, TaskCard
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import (
    MIN_TEMPERATURE,
    GenerationSpec,
    Grammar,
    SamplingParams,
)
from dynamic_lora_server.requests.chat_template import Tokenizer, check_written, render
from dynamic_lora_server.requests.structured import generate_grammar, openai_grammar
from dynamic_lora_server.schemas.generate import GenerateParameters, GenerateRequest
from dynamic_lora_server.schemas.openai import ChatRequest, CompletionRequest, SamplingRequest
from dynamic_lora_server.tools.notation import NOTATIONS
from dynamic_lora_server.tools.offer import Offer, check_choice, offer_of

if TYPE_CHECKING:
    from dynamic_lora_adapters.files.chat import ChatFormat
    from dynamic_lora_server.text import TokenizerView

COMPLETION_TOKENS = 16
CHAT_TOKENS = 1024

_SAMPLING_FIELDS = (
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)


def generate_spec(
    body: GenerateRequest,
    *,
    adapter: str | Composition | None,
    card: TaskCard | None,
) -> GenerationSpec:
    """The spec of a `/generate` body; `card` is None for the base model and for raw requests.

    Raises InvalidParameter for combinations that contradict each other.
    """
    own = body.parameters
    _check_combinations(own, stream=body.stream)
    text = body.inputs if card is None else card.render(body.inputs)
    merged = _with_card_defaults(own, card)
    return GenerationSpec(
        prompt=text,
        adapter=adapter,
        sampling=SamplingParams(
            temperature=_temperature(own, card),
            logprobs=bool(own.details) or body.stream,
            top_logprobs=own.top_n_tokens or 0,
            stop_token_ids=tuple(own.stop_token_ids or ()),
            logit_bias=_biases(own.logit_bias),
            min_new_tokens=own.min_new_tokens or 0,
            **_given(merged, ("max_new_tokens", "top_k", *_SAMPLING_FIELDS)),
        ),
        stop=tuple(merged.get("stop", ())),
        grammar=generate_grammar(own),
        keep_last=own.truncate,
        clip_output=own.max_new_tokens is None,
        n=own.n or 1,
    )


def _check_combinations(own: GenerateParameters, *, stream: bool) -> None:
    if own.do_sample and own.temperature is not None and not _floored(own.temperature):
        raise InvalidParameter(
            f"do_sample asks to sample, but temperature {own.temperature:g} is greedy.",
            field="parameters.temperature",
            fix="Leave one of the two out.",
        )
    if (own.n or 1) > 1 and not (own.details or stream):
        raise _needs_details("n")
    if own.top_n_tokens and not (own.details or stream):
        raise _needs_details("top_n_tokens")
    if stream and (own.n or 1) > 1:
        raise InvalidParameter(
            "A stream of /generate carries one continuation.",
            field="parameters.n",
            fix="Leave n out, or use /v1/completions, whose streams carry several.",
        )


def _needs_details(name: str) -> InvalidParameter:
    return InvalidParameter(
        f"{name} is answered in details, which are not asked for.",
        field=f"parameters.{name}",
        fix="Add details=true.",
    )


def _with_card_defaults(own: GenerateParameters, card: TaskCard | None) -> dict[str, Any]:
    defaults = {} if card is None else card.parameters.model_dump(exclude_none=True)
    asked = own.model_dump(exclude_none=True)
    if not own.stop:
        asked.pop("stop", None)  # TGI's and LoRAX's clients send an empty list where none is given
    return defaults | asked


def _given(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _temperature(own: GenerateParameters, card: TaskCard | None) -> float:
    """What asks to sample, as in TGI; the first of these that is set decides:

    1. the request's temperature;
    2. its `do_sample`: the card's temperature, or 1;
    3. the card's temperature;
    4. the card's `do_sample` or the request's filters: 1; else 0.

    A `do_sample` of false is unset: TGI's and LoRAX's clients send it where none is given.
    """
    if own.temperature is not None:
        return _floored(own.temperature)
    defaults = CardParameters() if card is None else card.parameters
    if own.do_sample:
        return _floored(defaults.temperature or 0.0) or 1.0
    if defaults.temperature is not None:
        return _floored(defaults.temperature)
    return 1.0 if defaults.do_sample or _filters(own) else 0.0


def _filters(own: GenerateParameters) -> bool:
    """Whether a request leaves out unlikely tokens, which means nothing to greedy decoding."""
    return bool(own.top_k) or bool(own.min_p) or (own.top_p is not None and own.top_p < 1)


def _floored(temperature: float) -> float:
    return 0.0 if temperature < MIN_TEMPERATURE else temperature


def completion_specs(body: CompletionRequest, *, adapter: str | None) -> list[GenerationSpec]:
    """One spec for each prompt of a `/v1/completions` body."""
    if body.max_tokens == 0 and not body.echo:
        raise InvalidParameter(
            "max_tokens is 0, and nothing else is asked for.",
            field="max_tokens",
            fix="Add echo=true to get the prompt back, with logprobs its log-probabilities.",
        )
    sampling = replace(
        _openai_sampling(
            body,
            # Of none at all the answer leaves one out: what it costs is what the prompt costs.
            max_new_tokens=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens or 1,
            logprobs=body.logprobs is not None,
            top_logprobs=body.logprobs or 0,
        ),
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    grammar = openai_grammar(body)
    return [
        GenerationSpec(
            prompt=prompt,
            adapter=adapter,
            sampling=sampling,
            stop=_stop(body),
            grammar=grammar,
            clip_output=body.max_tokens is None,
            include_stop=bool(body.include_stop_str_in_output),
            echo=bool(body.echo),
            n=body.n or 1,
        )
        for prompt in _prompts(body.prompt)
    ]


def _prompts(prompt: Any) -> list[str | tuple[int, ...]]:
    """The forms OpenAI allows: text, ids, a list of texts, a list of lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [part if isinstance(part, str) else tuple(part) for part in prompt]


def chat_spec(
    body: ChatRequest,
    *,
    adapter: str | Composition | None,
    tokenizer: Tokenizer,
    chat: "ChatFormat | None" = None,
    offer: Offer | None = None,
) -> GenerationSpec:
    """The spec of a `/v1/chat/completions` body: the messages through the chat template.

    `chat` is the adapter's, if it is one alone; its template goes before the base model's. `offer`
    is what the model may call. Raises what `render` does, and InvalidParameter for fields that
    contradict each other.
    """
    limit = _chat_limit(body)
    return GenerationSpec(
        prompt=render(
            body.messages,
            body.chat_template_kwargs or {},
            tokenizer,
            chat,
            body,
            adapter=adapter,
        ),
        add_special_tokens=False,  # the template writes those that it wants
        adapter=adapter,
        sampling=_openai_sampling(
            body,
            max_new_tokens=limit or CHAT_TOKENS,
            logprobs=bool(body.logprobs),
            top_logprobs=_top_logprobs(body),
        ),
        stop=_stop(body),
        grammar=_chat_grammar(body, offer),
        shown_tokens=() if offer is None else offer.notation.markers,
        clip_output=limit is None,
        include_stop=bool(body.include_stop_str_in_output),
        n=body.n or 1,
    )


def chat_offer(
    body: ChatRequest,
    *,
    tokenizer: Tokenizer,
    view: "TokenizerView",
    otherwise: str,
    adapter: str | Composition | None = None,
    chat: "ChatFormat | None" = None,
) -> Offer | None:
    """What the model may call, in the notation of its chat template, or `otherwise` in that one.

    Raises InvalidParameter where the template does not write tools, where it cannot be told
    how calls are written, and what `offer_of` and `check_choice` raise.
    """
    check_choice(body)
    if not body.tools or body.tool_choice == "none":
        return None
    found = check_written(body.messages, tokenizer, chat, with_tools=True, adapter=adapter)
    notation = found.notation or NOTATIONS.get(otherwise)
    if notation is None:
        raise InvalidParameter(
            "The chat template does not tell in which notation the model writes calls.",
            field="tools",
            fix="Start the server with --tool-call-format, or set tool_choice to none.",
        )
    return offer_of(body, notation, view)


def _chat_grammar(body: ChatRequest, offer: Offer | None) -> Grammar | None:
    asked = openai_grammar(body)
    if offer is None:
        return asked
    if asked is not None:
        raise InvalidParameter(
            f"{asked.field} says what the text of an answer must be like, and tools that it may "
            "be a call.",
            field=asked.field,
            fix="Leave one of the two out, or set tool_choice to none.",
        )
    return offer.grammar


def _chat_limit(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidParameter(
            f"max_tokens is {old}, but max_completion_tokens is {new}.",
            field="max_completion_tokens",
            fix="Give one of the two.",
        )
    return old if new is None else new


def _top_logprobs(body: ChatRequest) -> int:
    if body.top_logprobs and not body.logprobs:
        raise InvalidParameter(
            "top_logprobs needs logprobs.", field="top_logprobs", fix="Add logprobs=true."
        )
    return body.top_logprobs or 0


def _openai_sampling(
    body: SamplingRequest, *, max_new_tokens: int, logprobs: bool, top_logprobs: int
) -> SamplingParams:
    _check_stream_options(body)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else _floored(body.temperature),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        top_k=max(0, body.top_k or 0),  # vLLM's -1 is off
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=_biases(body.logit_bias),
        min_new_tokens=body.min_tokens or 0,
        **body.model_dump(include={*_SAMPLING_FIELDS}, exclude_none=True),
    )


def _biases(given: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    return tuple((int(token_id), bias) for token_id, bias in (given or {}).items())


def _check_stream_options(body: SamplingRequest) -> None:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidParameter(
            "stream_options needs stream.", field="stream_options", fix="Add stream=true."
        )
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise InvalidParameter(
            "continuous_usage_stats needs include_usage.",
            field="stream_options.continuous_usage_stats",
            fix="Add include_usage=true.",
        )


def _stop(body: SamplingRequest) -> tuple[str, ...]:
    stop = body.stop or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
