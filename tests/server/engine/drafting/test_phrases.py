"""What followed which tokens, and how well that foretells the next one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_server.engine.drafting import phrases
from dynamic_lora_server.engine.drafting.phrases import (
    Phrases,
    Speaker,
    Speakers,
    Text,
    contexts_of,
)

TOKENS = st.lists(st.integers(0, 5), max_size=40)


def said(speaker: Speaker, prompt: list[int], *tokens: int) -> Text:
    text = Text(speaker, prompt)
    for token_id in tokens:
        text.expected(1, 0.0)
        text.hear([token_id])
    return text


def guessed(text: Text, most: int = 7) -> list[int]:
    return [token_id for token_id, _ in text.expected(most, 0.0)]


def test_a_text_that_repeats_itself_is_taken_to_go_on() -> None:
    assert guessed(Text(Speaker(), [1, 2, 3, 4, 1, 2]), 3) == [3, 4, 1]


def test_what_the_speaker_said_before_is_taken_to_come_again() -> None:
    speaker = Speaker()
    said(speaker, [9, 8], 1, 2, 3)
    assert guessed(said(speaker, [7, 8], 1), 2) == [2, 3]
    assert guessed(Text(Speaker(), [7, 8])) == []


def test_the_longer_context_counts_and_then_the_text_itself() -> None:
    speaker = Speaker()
    said(speaker, [], 1, 2, 3, 9, 2, 4)
    # After 2 came 4 last, after 1 2 came 3.
    assert guessed(said(speaker, [], 1, 2), 1) == [3]
    # The prompt, too, says what comes after 5 2, and nobody else does.
    assert guessed(said(speaker, [5, 2, 7], 5, 2), 1) == [7]


def test_what_was_said_last_replaces_what_was_before() -> None:
    speaker = Speaker()
    for token_id in (3, 4):
        said(speaker, [1, 2], token_id)
    assert guessed(Text(speaker, [1, 2]), 1) == [4]


def test_guesses_that_go_wrong_are_trusted_less() -> None:
    speaker = Speaker()
    said(speaker, [1], 2)
    ((_, before),) = said(speaker, [1]).expected(1, 0.0)
    for token_id in range(3, 30):
        said(speaker, [1], token_id)
    ((_, after),) = said(speaker, [1]).expected(1, 0.0)
    assert after < before / 3
    assert said(speaker, [1]).expected(1, 0.2) == []


def test_guesses_that_come_true_are_trusted_more() -> None:
    speaker = Speaker()
    for _ in range(30):
        said(speaker, [1], 2, 3, 4)
    chances = [chance for _, chance in said(speaker, [1], 2).expected(2, 0.0)]
    assert min(chances) > 0.8


@given(prompt=TOKENS, tokens=TOKENS)
def test_the_end_is_looked_up_where_it_was_last(prompt: list[int], tokens: list[int]) -> None:
    """The latest place of the longest end, as a slow search finds it."""
    text = prompt + tokens
    heard = Text(Speaker(), prompt)
    heard.expected(1, 0.0)
    for token_id in tokens:
        heard.hear([token_id])
    heard._speaker = Speaker()  # who has said nothing
    found = [
        text[place + 1]
        for length in range(min(phrases.LONGEST, len(text)), 0, -1)
        for place in range(len(text) - 2, length - 2, -1)
        if text[place + 1 - length : place + 1] == text[len(text) - length :]
    ]
    assert guessed(heard, 1) == found[:1]


def test_all_that_was_expected_is_scored_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speaker = Speaker()
    said(speaker, [], 1, 2, 3, 4, 5)
    scored: list[bool] = []
    monkeypatch.setattr(speaker.record, "score", lambda _, *, right: scored.append(right))
    text = Text(speaker, [1])
    assert guessed(text) == [2, 3, 4, 5]
    text.hear([2, 3, 9])
    assert scored == [True, True, False]
    text.hear([4])  # nobody had asked
    assert scored == [True, True, False]


class Letters:
    """Allows one text."""

    def __init__(self, *tokens: int) -> None:
        self.left = list(tokens)

    def permits(self, token_id: int) -> bool:
        return self.left[:1] == [token_id]

    def forced(self) -> int | None:
        return self.left[0] if self.left else None

    def take(self, token_id: int) -> None:
        assert self.left.pop(0) == token_id


def test_what_a_grammar_forces_replaces_what_it_does_not_permit() -> None:
    speaker = Speaker()
    said(speaker, [], 1, 2, 3, 4, 5)
    text = Text(speaker, [1])
    expected = text.expected(7, 0.0, (), Letters(2, 7, 8, 3, 4))
    assert [token_id for token_id, _ in expected] == [2, 7, 8, 3, 4]
    before = expected[1][1] / expected[0][1]
    for number in range(20):
        text = Text(speaker, [1])
        text.expected(7, 0.0, (), Letters(2, 50 + number))
        text.hear([2, 50 + number])
    expected = text.expected(7, 0.0, (), Letters(8))
    assert expected[0][1] > max(before, 0.9)


def test_nothing_is_expected_behind_an_end() -> None:
    speaker = Speaker()
    said(speaker, [], 1, 2, 3, 4, 5)
    assert [token for token, _ in Text(speaker, [1]).expected(7, 0.0, {4})] == [2, 3]


@given(prompt=TOKENS, tokens=TOKENS, most=st.integers(0, 7), least=st.floats(0, 1))
def test_chances_fall_along_a_guess(
    prompt: list[int], tokens: list[int], most: int, least: float
) -> None:
    expected = said(Speaker(), prompt, *tokens).expected(most, least)
    chances = [chance for _, chance in expected]
    assert len(expected) <= most
    assert chances == sorted(chances, reverse=True)
    assert all(least <= chance <= 1 for chance in chances)
    assert {token_id for token_id, _ in expected} <= set(prompt + tokens)


def test_contexts_tell_orders_apart() -> None:
    assert contexts_of([]) == []
    assert len(set(contexts_of([5, 5, 5, 5, 5]))) == len(phrases.ORDERS)


def test_phrases_keep_to_their_capacity_and_forget_the_older() -> None:
    kept = Phrases(100)
    for number in range(1000):
        kept.note([number], number)
        assert len(kept) <= 100
    assert kept.after(999) == 999
    assert kept.after(0) is None


def test_only_the_end_of_a_long_prompt_is_read() -> None:
    long = [3, 4, *[0] * phrases._MAX_PROMPT, 3]
    assert guessed(Text(Speaker(), long), 1) == []


def test_the_least_recently_heard_speaker_is_forgotten() -> None:
    speakers, size = Speakers(), 2**15
    for number in range(20):
        speakers.of("always").phrases.note([number], 1)
        speakers.of(str(number)).phrases.note(range(size), 1)
        assert speakers.num_contexts <= phrases.MAX_CONTEXTS + size
    assert len(speakers.of("0").phrases) == 0
    assert len(speakers.of("19").phrases) == size
    assert len(speakers.of("always").phrases) == 20


def test_speakers_of_few_words_are_bounded_too() -> None:
    speakers = Speakers()
    for number in range(2 * phrases.MAX_SPEAKERS):
        speakers.of("always").phrases.note([number], 1)
        speakers.of(str(number)).phrases.note([number], 1)
        assert len(speakers) <= phrases.MAX_SPEAKERS
    assert len(speakers.of("always").phrases) == 2 * phrases.MAX_SPEAKERS
