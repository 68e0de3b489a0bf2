"""Which requests count as cold and which as warm, and what is made of their times."""

import random
from collections.abc import Iterator

import pytest

from benchmarks.prefix import PrefixCell, measure, prompts
from benchmarks.workload import PromptMaker


class _WordTokenizer:
    """One token a word."""

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(["alpha", "beta", "gamma", "delta"])}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [len(word) for word in text.split()]


def test_prompts_share_their_template_and_nothing_else() -> None:
    templates, questions = (PromptMaker(_WordTokenizer(), n) for n in (40, 20))
    rng = random.Random(0)
    together = [p.split() for p in prompts(templates, questions, rng, num_warm=2)]
    assert [len(words) for words in together] == [60] * 3
    assert len({tuple(words[:40]) for words in together}) == 1
    assert len({tuple(words[40:]) for words in together}) == 3
    (other,) = prompts(templates, questions, rng, num_warm=0)
    assert other.split()[:40] != together[0][:40]


async def test_the_first_request_with_a_template_is_cold() -> None:
    seen: list[tuple[str, int | None]] = []

    async def ttft(prompt: str, adapter: int | None) -> float:
        seen.append((prompt, adapter))
        return 9.0 if prompt == "new" else 2.0 if adapter is None else 3.0

    def new_prompts() -> Iterator[str]:
        return iter(["new", "known", "known"])

    base, adapter = await measure(ttft, new_prompts, names=["a"], num_trials=2)
    assert base == PrefixCell(served="base", cold_s=[9.0] * 2, warm_s=[2.0] * 4)
    assert adapter == PrefixCell(served="a", cold_s=[9.0] * 2, warm_s=[3.0] * 4)
    assert (base.ratio, adapter.document()["ratio"]) == (4.5, pytest.approx(3.0))
    assert [index for _, index in seen] == [None] * 3 + [0] * 3 + [None] * 3 + [0] * 3
