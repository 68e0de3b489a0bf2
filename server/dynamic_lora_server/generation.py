"""A generation as the HTTP layer asks for it and gets it back. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from dynamic_lora_adapters.compositions.composition import Composition
from dynamic_lora_adapters.files.card import MAX_STOP_STRINGS
from dynamic_lora_server.errors import InvalidParameter

BASE = "base"  # names the base model wherever an adapter can be named
# Below this a temperature is greedy: the division would leave the range of float32.
MIN_TEMPERATURE = 1e-5
MAX_N = 32
MAX_STOP_TOKENS = 32
MAX_BIASES = 1024
# Log-probabilities of prompts that one request gets back: some 35 bytes each as JSON.
MAX_PROMPT_LOGPROBS = 2**21
# Beyond any vocabulary, and within what a tensor's indices hold.
MAX_TOP_K = 2**31 - 1


class FinishReason(StrEnum):
    """Why a sequence ended."""

    EOS = "eos"  # the model's end-of-sequence token
    STOP = "stop"  # a stop string or stop token id of the request
    LENGTH = "length"  # max_new_tokens reached


class ServedMode(StrEnum):
    """How the tokens of a sequence were computed."""

    BASE = "base"  # no adapter
    BYPASS = "bypass"  # deltas beside the base weights
    MERGED = "merged"  # weights that held the adapter
    BOTH = "both"  # some tokens the one way, some the other


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. A `temperature` of 0 (below 1e-5) is greedy.

    Penalties and filters are applied in the order repetition, presence and
    frequency penalty, bias, grammar, temperature, top-k, top-p, min-p. `repetition_penalty`
    (Keskar et al. 2019) covers prompt and output, the other two the output
    only, as in OpenAI's API. Log-probabilities are those of the model before
    any penalty, bias, grammar, temperature or filter.

    Raises InvalidParameter, naming the field.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what is added to their logits
    min_new_tokens: int = 0  # before these no token ends the sequence
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False  # report the chosen token's log-probability
    top_logprobs: int = 0  # and those of the n most likely tokens
    prompt_logprobs: bool = False  # the same of the prompt's tokens

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1")
        _check("temperature", 0 <= self.temperature <= 100, "must lie between 0 and 100")
        _check("top_k", 0 <= self.top_k <= MAX_TOP_K, f"must lie between 0 (off) and {MAX_TOP_K}")
        _check("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        _check("min_p", 0 <= self.min_p <= 1, "must lie between 0 and 1")
        _check(
            "repetition_penalty",
            0.01 <= self.repetition_penalty <= 100,
            "must lie between 0.01 and 100",
        )
        _check("presence_penalty", -2 <= self.presence_penalty <= 2, "must lie between -2 and 2")
        _check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "must lie between -2 and 2")
        _check("seed", self.seed is None or 0 <= self.seed < 2**64, "must fit in 64 bits")
        _check("min_new_tokens", self.min_new_tokens >= 0, "must not be negative")
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidParameter(
                f"The answer is to have at least {self.min_new_tokens} tokens, and at most "
                f"{self.max_new_tokens}.",
                field="min_new_tokens",
            )
        few = len(self.logit_bias) <= MAX_BIASES
        _check("logit_bias", few, f"must not name more than {MAX_BIASES} tokens")
        within = all(-100 <= bias <= 100 for _, bias in self.logit_bias)
        _check("logit_bias", within, "must lie between -100 and 100 for each token")
        _check("top_logprobs", 0 <= self.top_logprobs <= 20, "must lie between 0 and 20")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def counts_output(self) -> bool:
        """Whether tokens of the output are less likely to come again."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on the tokens seen so far."""
        return self.repetition_penalty != 1 or self.counts_output


def _check(name: str, valid: bool, rule: str) -> None:
    if not valid:
        raise InvalidParameter(f"{name} {rule}.", field=name)


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "JSON schema"
    REGEX = "regular expression"
    CHOICE = "list of texts"  # as JSON; the answer is one of them
    RULES = "context-free grammar"  # in Lark's notation or in llama.cpp's (GBNF)
    CALLS = "grammar of calls"  # in llguidance's Lark


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole text of an answer must be like; `field` of the request asks for it."""

    kind: GrammarKind
    source: str
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """One request, whatever wire it came over.

    `prompt` is text, already rendered, or token ids. Of a text, only the last `keep_last` tokens
    are kept, if that is given. `adapter` is a composition, or the text of one: in the simplest
    case a task name. None is the base model. `n` asks for that many independent continuations;
    where a seed is given, continuation i uses seed + i. Each keeps to the `grammar`, if there is
    one. Of special tokens, those named in `shown_tokens` are part of the text.
    """

    prompt: str | tuple[int, ...]
    adapter: str | Composition | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the stop string in the text
    echo: bool = False  # give the prompt back before each answer
    add_special_tokens: bool = True
    keep_last: int | None = None
    clip_output: bool = False
    n: int = 1
    grammar: Grammar | None = None
    shown_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("keep_last", self.keep_last is None or self.keep_last > 0, "must be above 0")
        _check("n", 1 <= self.n <= MAX_N, f"must lie between 1 and {MAX_N}")
        _check("stop", all(self.stop), "must not hold an empty string")
        few = len(self.stop) <= MAX_STOP_STRINGS
        _check("stop", few, f"must hold at most {MAX_STOP_STRINGS} strings")
        goes_on = self.grammar is not None and self.sampling.ignore_eos
        _check("ignore_eos", not goes_on, "cannot be: where a grammar ends, nothing may follow")
        waits = self.grammar is not None and self.sampling.min_new_tokens > 0
        _check("min_new_tokens", not waits, "cannot be: where a grammar ends, nothing may follow")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A candidate token, in bytes too, and its natural-log probability."""

    token_id: int
    token_bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        """What the token reads as, a part of a character as U+FFFD."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPiece:
    """One generated token of continuation `index`.

    `text` is what this token adds to the visible text: empty while a character
    is incomplete or while the text may turn out to be a stop string.
    `token_bytes` is what the token itself stands for, maybe a part of a character,
    and `offset` the number of characters before it, in all text: shown, held back
    or cut off. `logprob` is set when asked for. `is_last` says that the
    continuation's Finish comes next.
    """

    index: int
    token_id: int
    text: str
    token_bytes: bytes
    offset: int
    special: bool
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    is_last: bool = False

    @property
    def token_text(self) -> str:
        """What the token itself reads as, a part of a character as U+FFFD."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """The prompt of continuation `index`, before the first of its pieces.

    `pieces` are its tokens where their log-probabilities were asked for; the first
    has none, as nothing is before it. They may be read several times, and may be made as
    they are read.
    """

    index: int
    text: str
    pieces: Iterable[TokenPiece]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The single successful end of continuation `index`.

    `tail` is text held back until now (to be appended after the last piece's
    text); `text` is the whole text. `num_cached_tokens` of the prompt were not
    computed for it, but found in the prefix cache.
    """

    index: int
    reason: FinishReason
    text: str
    tail: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    seed: int | None
    mode: ServedMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """First event of a generation: who serves it; None twice for the base model.

    `adapter` is the canonical text of the composition, `version` the adapter's
    content hash or that of the composition. `name` is set where one adapter
    serves it as it was trained, pinned to a version or not.
    """

    adapter: str | None
    version: str | None
    num_prompt_tokens: int
    name: str | None = None


GenerationEvent = Started | Echo | TokenPiece | Finish
