"""What goes in and what comes back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

WeightedAdapters = Sequence[tuple[str, float]]
"""Adapters with their weights: `[("ner", 0.7), ("tone", 0.3)]`."""


class Parameters(TypedDict, total=False):
    """How to generate. What is left out falls to the adapter's task card, then the server.

    Greedy unless `do_sample` is true, `temperature` is above 0, or, with neither given,
    `top_k`, `top_p` or `min_p` leaves tokens out. `grammar` holds the answer to a JSON schema,
    `{"type": "json", "value": schema}`, or to a regular expression, `{"type": "regex", ...}`;
    `response_format` says it as OpenAI's clients do. `truncate` keeps so many of the prompt's
    last tokens, `return_full_text` puts the prompt before the answer. With `n`, which streams do
    not take, the further answers are the Generation's `others`; `top_n_tokens` gives each token
    its `top_tokens`. `merged_adapters` is LoRAX's way to name several adapters, where a weighted
    sum is not what is wanted, `adapter_source` its way to say `"hub"`. `logit_bias` adds to the
    logits of tokens, by their ids as text.
    """

    adapter_source: str
    do_sample: bool
    frequency_penalty: float
    grammar: Mapping[str, Any]
    ignore_eos: bool
    logit_bias: Mapping[str, float]
    max_new_tokens: int
    merged_adapters: Mapping[str, Any]
    min_new_tokens: int
    min_p: float
    n: int
    presence_penalty: float
    repetition_penalty: float
    response_format: Mapping[str, Any]
    return_full_text: bool
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    temperature: float
    top_k: int
    top_n_tokens: int
    top_p: float
    truncate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token; `logprob` is its natural-log probability where reported.

    `top_tokens` are the likeliest at its position, where `top_n_tokens` asked for them.
    """

    id: int
    text: str
    logprob: float | None
    special: bool
    top_tokens: tuple["Token", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """One more answer to the same prompt (`n` above 1)."""

    text: str
    finish_reason: str
    num_tokens: int
    seed: int | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished generation.

    `adapter` and `adapter_version` say who served it; for the base model the
    server reports "base" and no version.
    `num_cached_tokens` of the prompt were found in the server's prefix cache.
    `mode` says how the tokens were computed ("base", "bypass", "merged" or "both").
    `finish_reason` ("length", "eos_token" or "stop_sequence"), the token counts, `mode`
    and `seed` are None, and `tokens` is empty, where no details were asked for.
    `others` are the further answers, where `n` asked for some.
    """

    text: str
    adapter: str | None
    adapter_version: str | None
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_tokens: int | None = None
    seed: int | None = None
    mode: str | None = None
    tokens: tuple[Token, ...] = ()
    others: tuple[Continuation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's passport.

    `chat_template` says that it has one of its own, `end_tokens` what ends its answers
    besides the base's own.
    `version` is the SHA-256 of its content; `tier` says where its weights are
    ("device" or "disk"), `mode` how they are used ("merged" or "bypass"); None
    where the server did not say. `document` is the passport as the server sent
    it, with every field.
    """

    name: str
    version: str
    kind: str
    rank: int
    target_modules: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    base_model: str | None
    created_at: str
    chat_template: bool
    end_tokens: tuple[str | int, ...]
    description: str | None
    notes: tuple[str, ...]
    ignored_files: tuple[str, ...]
    tier: str | None
    mode: str | None
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableAdapter:
    """An adapter that the server keeps and cannot serve, and the `reason`."""

    name: str
    version: str
    reason: str
    document: Mapping[str, Any]


class AdapterList(list[Adapter]):
    """The server's adapters; `unreadable` are those that it cannot serve."""

    def __init__(
        self,
        adapters: Iterable[Adapter] = (),
        *,
        unreadable: tuple[UnreadableAdapter, ...] = (),
    ) -> None:
        super().__init__(adapters)
        self.unreadable = unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A weighted sum of adapters that the server keeps under a name.

    `text` is its canonical text; `version` the hash of what it computes now,
    None while one of its adapters is missing. `document` is all that the
    server sent.
    """

    name: str
    text: str
    version: str | None
    created_at: str
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """The answer to an upload; `created` is False if the server had this content already."""

    adapter: Adapter
    created: bool
