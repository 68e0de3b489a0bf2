"""The body and answers of `/generate` and `/generate_stream`, in TGI's and LoRAX's shapes."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints

from dynamic_lora_adapters.files.card import MAX_STOP_STRINGS
from dynamic_lora_server.generation import MAX_BIASES, MAX_N, MAX_STOP_TOKENS, ServedMode
from dynamic_lora_server.schemas._base import (
    Answer,
    NonEmptyText,
    Text,
    Unset,
    UnsetOrEmptyList,
    UnsetOrFalse,
    UnsetOrOne,
    Wire,
    null_is,
)
from dynamic_lora_server.schemas.compositions import MergedAdapters, WeightedAdapters
from dynamic_lora_server.schemas.structured import ResponseFormat, TgiGrammar

StopStrings = Annotated[list[NonEmptyText], Field(max_length=MAX_STOP_STRINGS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
StopTokenIds = Annotated[TokenIds, Field(max_length=MAX_STOP_TOKENS)]
LogitBias = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=MAX_BIASES),
]


# LoRAX's other sources, and what serves in their place.
_OTHER_SOURCES = {
    "local": "give the folder a name with POST /adapters, and name that",
    "s3": "upload the adapter with POST /adapters, and name it",
    "pbase": "upload the adapter with POST /adapters, and name it",
}


def _check_source(source: object) -> object:
    if isinstance(source, str) and source in _OTHER_SOURCES:
        raise ValueError(f"{source!r} is not supported by this server; {_OTHER_SOURCES[source]}")
    return source


AdapterSourceName = Annotated[Literal["hub"] | None, BeforeValidator(_check_source)]


class GenerateParameters(Wire):
    """How to generate. Null is the same as leaving a field out.

    What is left out comes from the adapter's task card, then from the defaults
    named here. Decoding is greedy unless `do_sample` is true, `temperature` is
    above 0, or, with neither of them given, `top_k`, `top_p` or `min_p` leaves
    tokens out. A `seed` alone leaves it greedy.
    """

    adapter_id: Text | None = Field(
        default=None,
        description="Task name, or a sum such as `ner*0.7+tone*0.3`; none: the base model.",
    )
    adapter_source: AdapterSourceName = Field(
        default=None,
        description="Where an adapter that is not here is to come from, named by its id there: "
        "`hub`, if the server fetches it (`--fetch-from-hub`).",
    )
    adapters: WeightedAdapters | None = Field(default=None, description="A sum, as a list.")
    merged_adapters: MergedAdapters | None = None
    max_new_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="Default 100, or what the context has left."
    )
    do_sample: bool | None = Field(
        default=None,
        description="True: sample, at temperature 1 if none set. False is the same as left out.",
    )
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 is greedy.")
    top_k: int | None = Field(default=None, ge=0, description="0 is off.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(
        default=None, description="What is added to the logits of tokens, by their ids."
    )
    min_new_tokens: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="Before these neither the end nor a stop token comes.",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop: StopStrings | None = Field(
        default=None, description="Replaces the card's stop strings, unless it is empty."
    )
    stop_token_ids: StopTokenIds | None = Field(
        default=None, description="End the text before them."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Go on after the end-of-sequence token."
    )
    n: int | None = Field(
        default=None, ge=1, le=MAX_N, description="Above 1 needs `details`, no streaming."
    )
    details: bool | None = Field(default=None, description="Answer with `details`.")
    top_n_tokens: int | None = Field(
        default=None, ge=0, le=20, description="Above 0 needs `details` or a stream."
    )
    return_full_text: bool | None = Field(
        default=None, description="Put the prompt before the answer."
    )
    truncate: int | None = Field(
        default=None, ge=1, lt=2**31, description="Keep the prompt's last tokens only."
    )
    grammar: TgiGrammar | None = Field(default=None, description="What the answer must be like.")
    response_format: ResponseFormat | None = Field(
        default=None, description="As `grammar`, in LoRAX's shape and in OpenAI's."
    )
    adapter_parameters: Unset = None
    api_token: Unset = None
    best_of: UnsetOrOne = None
    decoder_input_details: UnsetOrFalse = None
    ignore_eos_token: UnsetOrFalse = None
    return_k_alternatives: Unset = None
    stop_sequences: UnsetOrEmptyList = None
    typical_p: UnsetOrOne = None
    watermark: UnsetOrFalse = None


class GenerateRequest(Wire):
    """The body of `POST /generate` and `POST /generate_stream`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": "Ada Lovelace worked with Charles Babbage in London.",
                    "parameters": {"max_new_tokens": 64},
                }
            ]
        }
    )

    inputs: NonEmptyText = Field(description="The text; the task card's template wraps it.")
    parameters: Annotated[GenerateParameters, null_is({}, GenerateParameters)] = (
        GenerateParameters()
    )
    adapters: WeightedAdapters | None = Field(default=None, description="As `parameters.adapters`.")
    stream: Annotated[bool, null_is(False, bool)] = Field(
        default=False, description="Answer as server-sent events."
    )
    raw: Annotated[bool, null_is(False, bool)] = Field(
        default=False, description="Skip the task card: its template and its defaults."
    )


class Token(Answer):
    """One generated token. `logprob` is the model's own, before temperature and penalties."""

    id: int
    text: str
    logprob: float | None
    special: bool


FinishName = Literal["length", "eos_token", "stop_sequence"]


class Sequence(Answer):
    """One more continuation of the same prompt (`n` above 1).

    Its tokens, as those of `Details`, are made when they are written.
    """

    generated_text: str
    finish_reason: FinishName
    generated_tokens: int
    seed: int | None
    prefill: list[Token]
    tokens: Iterable[Token]
    top_tokens: Iterable[list[Token]] | None = None


class Details(Answer):
    """What happened while generating. `prefill` is always empty.

    `cached_tokens` of the prompt were found in the prefix cache and not computed.
    """

    finish_reason: FinishName
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int
    seed: int | None
    mode: ServedMode
    prefill: list[Token]
    tokens: Iterable[Token]
    top_tokens: Iterable[list[Token]] | None = None
    best_of_sequences: list[Sequence] | None = None


class GenerateResponse(Answer):
    """The answer of `POST /generate`."""

    generated_text: str
    details: Details | None = None


class StreamDetails(Answer):
    """Sent with the last event of a stream."""

    finish_reason: FinishName
    generated_tokens: int
    prompt_tokens: int
    input_length: int = Field(description="The same, as TGI's clients look for it.")
    cached_tokens: int
    seed: int | None
    mode: ServedMode


class StreamEvent(Answer):
    """One server-sent event: one token; the last also has the whole text and the details.

    The texts of all events together are `generated_text`. The text of a special token, and of the
    end token that ends the answer, is empty, unless it releases text that was held back as the
    possible start of a stop string; `special` is false then, as clients drop what is special.
    """

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None = None
    details: StreamDetails | None = None
