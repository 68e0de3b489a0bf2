import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Strip
from transformers import PreTrainedTokenizerBase

from dynamic_lora_server.errors import UnsupportedModel
from dynamic_lora_server.text import Detokenizer, TokenizerView
from tests.support.models import tiny_tokenizer

VIEW = TokenizerView(tiny_tokenizer())
EOS_ID = 1


def encode(text: str) -> tuple[int, ...]:
    return VIEW.encode(text, add_special_tokens=False)


def test_what_a_file_says_of_training_is_not_for_prompts() -> None:
    """Truncation and padding lie in tokenizer.json, and tokenizers obey in silence."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    text = "the rain in the plain " * 3
    expected = encode(text)
    assert 8 < len(expected) < 64
    assert TokenizerView(tokenizer).encode(text, add_special_tokens=False) == expected


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_text_has_no_fewer_tokens_than_said(text: str) -> None:
    assert VIEW.least_tokens(text) <= len(encode(text))
    assert VIEW.least_tokens("x" * 1000) > 0


def test_where_characters_may_vanish_nothing_is_said() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Strip()
    assert TokenizerView(tokenizer).least_tokens(" " * 10**6) == 0


def push_all(detokenizer: Detokenizer, token_ids: tuple[int, ...]) -> list[str]:
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()]


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_text(text: str) -> None:
    detokenizer = Detokenizer(VIEW)
    assert "".join(push_all(detokenizer, encode(text))) == detokenizer.text == text


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=4))
@settings(max_examples=200, deadline=None)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(VIEW, stop=stop)
    shown = "".join(push_all(detokenizer, encode(text)))
    assert shown == detokenizer.text
    assert text.startswith(shown)
    assert not any(s in shown for s in stop)
    assert detokenizer.stopped is any(s in text for s in stop)


def test_an_incomplete_character_waits_for_its_bytes() -> None:
    detokenizer = Detokenizer(VIEW)
    token_ids = encode("é")
    assert len(token_ids) == 2
    assert [detokenizer.push(i) for i in token_ids] == ["", "é"]


def test_a_character_that_is_never_completed_is_shown_as_replacement() -> None:
    detokenizer = Detokenizer(VIEW)
    assert push_all(detokenizer, encode("aé")[:2]) == ["a", "", "\ufffd"]


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    detokenizer = Detokenizer(VIEW, stop=["xyz"])
    pieces = push_all(detokenizer, (*encode("a"), *encode("x"), *encode("y"), *encode("b")))
    assert pieces == ["a", "", "", "xyb", ""]


def test_the_stop_string_is_kept_on_demand() -> None:
    detokenizer = Detokenizer(VIEW, stop=["\n"], include_stop=True)
    assert "".join(push_all(detokenizer, encode("one\ntwo"))) == "one\n"


def test_special_tokens_are_not_shown() -> None:
    detokenizer = Detokenizer(VIEW)
    assert push_all(detokenizer, (*encode("a"), EOS_ID)) == ["a", "", ""]
    assert VIEW.is_special(EOS_ID)
    assert VIEW.text_of(EOS_ID) == "</s>"


def test_tokens_are_counted_with_the_one_that_stops() -> None:
    detokenizer = Detokenizer(VIEW, stop=["b"])
    push_all(detokenizer, (*encode("a"), *encode("b"), *encode("c")))
    assert detokenizer.num_tokens == 2


def test_ids_that_the_model_has_no_row_for_are_not_known() -> None:
    known = VIEW.vocab_size
    assert TokenizerView(tiny_tokenizer(), num_embeddings=known + 7).vocab_size == known
    assert TokenizerView(tiny_tokenizer(), num_embeddings=known - 7).vocab_size == known - 7


def test_a_tokenizer_without_a_fast_version_is_refused_by_name() -> None:
    class Slow(PreTrainedTokenizerBase):
        pass

    with pytest.raises(UnsupportedModel, match="Slow has no fast"):
        TokenizerView(Slow())  # type: ignore[no-untyped-call]
