"""What is asked of a server: how many clients, which adapters, prompts of exact length."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

from benchmarks.errors import InvalidWorkload


@dataclass(frozen=True, slots=True)
class Popularity:
    """How requests spread over the adapters.

    `uniform`: all alike. `zipf:S`: the k-th adapter is asked in proportion to k**-S.
    `one`: always the first. `base`: none, the base model alone.
    """

    kind: str
    exponent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `uniform`, `zipf:S`, `one` or `base`. Raises InvalidWorkload."""
        kind, _, exponent = text.partition(":")
        if kind == "zipf":
            try:
                value = float(exponent)
            except ValueError:
                value = -1.0
            if not 0 < value < 100:
                raise InvalidWorkload(f"popularity {text!r}: zipf needs an exponent, as zipf:1.1")
            return cls(kind, value)
        if text not in {"uniform", "one", "base"}:
            raise InvalidWorkload(f"popularity {text!r}: expected uniform, zipf:S, one or base")
        return cls(kind)

    def weights(self, num_adapters: int) -> list[float]:
        """The share of each adapter, not normalised. Empty for the base model alone."""
        if self.kind == "base":
            return []
        if self.kind == "one":
            return [1.0] + [0.0] * (num_adapters - 1)
        return [float(rank) ** -self.exponent for rank in range(1, num_adapters + 1)]

    def __str__(self) -> str:
        return f"zipf:{self.exponent:g}" if self.kind == "zipf" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else drawn. Raises InvalidWorkload."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise InvalidWorkload("temperature must lie between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise InvalidWorkload("top_p must be above 0, and 1 at most")
        if self.top_k < 0:
            raise InvalidWorkload("top_k must be at least 0")
        if self.greedy and (self.top_p < 1 or self.top_k):
            raise InvalidWorkload("top_p and top_k need a temperature above 0")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def __str__(self) -> str:
        if self.greedy:
            return "the likeliest"
        return (
            f"drawn at temperature {self.temperature:g}, top-p {self.top_p:g}, top-k {self.top_k}"
        )

    def parameters(self) -> dict[str, Any]:
        """The fields of a request's body, by the names that every server has for them."""
        if self.greedy:
            return {"temperature": 0}
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One cell of the measurement: a closed loop of `num_clients` over fixed-length requests.

    The loop ends after `num_requests`, or, once `seconds` have passed, after a multiple of
    `num_clients` requests; one of the two may be None. Raises InvalidWorkload, naming the option.
    """

    num_clients: int
    popularity: Popularity
    num_adapters: int = 8
    num_prompt_tokens: int = 64
    num_output_tokens: int = 64
    num_requests: int | None = None
    seconds: float | None = None
    seed: int = 0
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        for name in ("num_clients", "num_prompt_tokens", "num_output_tokens"):
            if getattr(self, name) < 1:
                raise InvalidWorkload(f"{name} must be at least 1")
        if self.num_adapters < 1 and self.popularity.kind != "base":
            raise InvalidWorkload(f"popularity {self.popularity} needs at least one adapter")
        if self.num_requests is None and self.seconds is None:
            raise InvalidWorkload("give a number of requests, a number of seconds, or both")
        if self.num_requests is not None and self.num_requests < 1:
            raise InvalidWorkload("num_requests must be at least 1")
        if self.seconds is not None and not self.seconds > 0:
            raise InvalidWorkload("seconds must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request: `adapter` is an index, or None for the base model."""

    prompt: str
    adapter: int | None
    num_output_tokens: int
    sampling: Sampling = Sampling()


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts are made with."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_tokens_to_string(self, tokens: list[str]) -> str: ...


class PromptMaker:
    """Makes different texts that the tokenizer encodes to exactly `num_tokens`.

    Words of one token each, drawn at random. What a tokenizer adds of its own, such as a
    token for the beginning, is part of the count, as it is part of the server's work.
    """

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._words = _single_token_words(tokenizer)
        overhead = len(tokenizer.encode(f"the {self._words[0]}")) - 2
        self._num_words = num_tokens - max(overhead, 0)
        if self._num_words < 1:
            raise InvalidWorkload(f"num_prompt_tokens={num_tokens} leaves no room for a word")

    def make(self, rng: random.Random) -> str:
        """A text of exactly the asked length. Raises InvalidWorkload where none is found."""
        for _ in range(100):
            text = " ".join(rng.choices(self._words, k=self._num_words))
            if len(self._tokenizer.encode(text)) == self._num_tokens:
                return text
        raise InvalidWorkload(f"found no text of exactly {self._num_tokens} tokens")


def _single_token_words(tokenizer: Tokenizer, limit: int = 2000) -> list[str]:
    """Words that stay one token both after a space and at the beginning of a text."""
    words = []
    for token in sorted(tokenizer.get_vocab()):
        word = tokenizer.convert_tokens_to_string([token]).strip()
        if not (word.isascii() and word.isalpha() and word.islower() and len(word) > 2):
            continue
        lengths = {
            len(tokenizer.encode(text, add_special_tokens=False)) for text in (word, f"the {word}")
        }
        if lengths == {1, 2}:
            words.append(word)
        if len(words) == limit:
            break
    if not words:
        raise InvalidWorkload("the tokenizer has no words of one token")
    return words


def requests(workload: Workload, prompts: PromptMaker) -> Iterator[Request]:
    """The endless sequence of requests of a workload: the same for every peer."""
    rng = random.Random(workload.seed)
    weights = workload.popularity.weights(workload.num_adapters)
    while True:
        adapter = rng.choices(range(len(weights)), weights)[0] if weights else None
        yield Request(
            prompt=prompts.make(rng),
            adapter=adapter,
            num_output_tokens=workload.num_output_tokens,
            sampling=workload.sampling,
        )


def warm_up_requests(
    workload: Workload, prompts: PromptMaker, num_requests: int | None = None
) -> list[Request]:
    """At least one short request for every adapter of the workload, and `num_requests`.

    None is one for every client.
    """
    rng = random.Random(workload.seed + 1)
    weights = workload.popularity.weights(workload.num_adapters)
    wanted: list[int | None] = [index for index, weight in enumerate(weights) if weight > 0]
    wanted = wanted or [None]
    return [
        Request(
            prompt=prompts.make(rng),
            adapter=wanted[index % len(wanted)],
            num_output_tokens=min(workload.num_output_tokens, 8),
            sampling=workload.sampling,
        )
        for index in range(max(len(wanted), num_requests or workload.num_clients))
    ]
