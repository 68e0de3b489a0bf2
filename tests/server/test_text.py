import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from dynamic_lora_server.errors import UnsupportedModel
from dynamic_lora_server.text import Detokenizer, TokenizerView
from tests.support.models import sentencepiece_tokenizer, tiny_tokenizer

VIEW = TokenizerView(tiny_tokenizer())
PIECES = TokenizerView(sentencepiece_tokenizer())
# "▁" is a space to PIECES, and "<s>" a token.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), min_size=1, max_size=40
)
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


@given(TEXTS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_places_are_those_of_the_characters(text: str, add_special_tokens: bool) -> None:
    places = list(VIEW.places(text, add_special_tokens=add_special_tokens))
    found = VIEW.backend.encode(text, add_special_tokens=add_special_tokens)
    assert [token_id for token_id, _, _ in places] == found.ids
    assert [(start, stop) for _, start, stop in places] == found.offsets
    shown = {character for _, start, stop in places for character in range(start, stop)}
    assert {i for i, character in enumerate(text) if not character.isspace()} <= shown


def test_a_token_that_is_not_of_the_text_has_no_place() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    first, second, *_ = TokenizerView(tokenizer).places("the rain", add_special_tokens=True)
    assert first == (0, 0, 0)
    assert second[1:] == (0, 3)


def test_token_ids_read_as_their_text() -> None:
    text = "the rain</s> là 🌧"
    assert VIEW.decode(VIEW.encode(text, add_special_tokens=False)) == text
    assert VIEW.decode([]) == ""


def push_all(detokenizer: Detokenizer, token_ids: tuple[int, ...]) -> list[str]:
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()]


@given(st.lists(st.integers(0, VIEW.vocab_size - 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_of_bytes_add_up_to_what_the_tokenizer_says(token_ids: list[int]) -> None:
    shown = "".join(push_all(Detokenizer(VIEW), tuple(token_ids)))
    assert shown == VIEW.backend.decode(token_ids, skip_special_tokens=True)


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


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_the_space_that_begins_an_answer_is_kept(text: str) -> None:
    token_ids = PIECES.encode(text, add_special_tokens=False)  # begins with a space of its own
    pieces = push_all(Detokenizer(PIECES), token_ids)
    assert "".join(pieces) == " " + text
    assert b"".join(map(PIECES.bytes_of, token_ids)).decode() == " " + text


@given(TEXTS, st.lists(st.sampled_from([" ", " a", "is", "a", " Paris", "é"]), max_size=4))
@settings(max_examples=200, deadline=None)
def test_stop_strings_are_found_in_pieces(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(PIECES, stop=stop)
    token_ids = PIECES.encode(text, add_special_tokens=False)
    assert "".join(push_all(detokenizer, token_ids)) == detokenizer.text
    ends = [(" " + text).find(one) for one in stop]
    assert detokenizer.text == (" " + text)[: min((e for e in ends if e >= 0), default=None)]


def test_a_stop_string_may_begin_with_the_space_of_the_first_token() -> None:
    token_ids = PIECES.encode("Paris is", add_special_tokens=False)
    assert PIECES.bytes_of(token_ids[0]) == b" Paris"
    detokenizer = Detokenizer(PIECES, stop=[" Paris"])
    assert detokenizer.push(token_ids[0]) == ""
    assert detokenizer.stopped


def test_bytes_that_are_no_character_spoil_none_beside_them() -> None:
    first, second = PIECES.encode("é", add_special_tokens=False)[1:]
    (letter,) = PIECES.encode("P", add_special_tokens=False)
    assert PIECES.bytes_of(letter) == b" P"
    pieces = push_all(Detokenizer(PIECES), (first, second, second, letter, first))
    assert pieces == ["", "é", "\ufffd", " P", "", "\ufffd"]


def test_an_incomplete_character_waits_for_its_bytes() -> None:
    detokenizer = Detokenizer(VIEW)
    token_ids = encode("é")
    assert len(token_ids) == 2
    assert [detokenizer.push(i) for i in token_ids] == ["", "é"]


def test_a_character_that_is_never_completed_is_shown_as_replacement() -> None:
    detokenizer = Detokenizer(VIEW)
    assert push_all(detokenizer, encode("aé")[:2]) == ["a", "", "\ufffd"]


def test_a_special_token_ends_the_text_if_its_name_is_a_stop_string() -> None:
    token_ids = (*encode("on"), EOS_ID, *encode("off"))
    for include_stop, text in ((False, "on"), (True, "on</s>")):
        detokenizer = Detokenizer(VIEW, stop=["</s>"], include_stop=include_stop)
        assert "".join(push_all(detokenizer, token_ids)) == detokenizer.text == text
        assert detokenizer.stopped
    other = Detokenizer(VIEW, stop=["<pad>", "</s>\n"])
    assert "".join(push_all(other, token_ids)) == "onoff"


def test_a_long_stop_string_takes_no_longer_for_each_token() -> None:
    """The bound is loose, for busy machines; what grows with the text would break it."""
    (token_id,) = encode("a")
    detokenizer = Detokenizer(VIEW, stop=["x" + 10**6 * "a", "a" * 10**6])
    begin = time.process_time()
    for _ in range(10_000):
        detokenizer.push(token_id)
    assert time.process_time() - begin < 2
    assert detokenizer.text == detokenizer.finish() == 10_000 * "a"


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
    assert VIEW.bytes_of(EOS_ID) == b"</s>"


def test_the_end_token_is_not_shown_though_it_is_an_ordinary_one() -> None:
    first, end = encode("a\n")
    detokenizer = Detokenizer(VIEW, stop=["\nb"])
    assert [detokenizer.push(end), detokenizer.push(first)] == ["", "\na"]
    assert detokenizer.push(end, ends=True) == ""
    assert (detokenizer.finish(), detokenizer.text, detokenizer.num_tokens) == ("", "\na", 3)


def test_an_end_token_that_is_a_stop_string_too_is_found() -> None:
    detokenizer = Detokenizer(VIEW, stop=["\n"], include_stop=True)
    (end,) = encode("\n")
    assert detokenizer.push(end, ends=True) == "\n"
    assert detokenizer.stopped


def test_a_special_token_of_the_file_alone_is_not_shown() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(["<|reserved|>"])
    view = TokenizerView(tokenizer)
    (reserved,) = view.encode("<|reserved|>", add_special_tokens=False)
    assert view.is_special(reserved)
    assert push_all(Detokenizer(view), (reserved,)) == ["", ""]


@pytest.mark.parametrize("view", [VIEW, PIECES], ids=["bytes", "pieces"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_token_is_found_at_its_offset(view: TokenizerView, data: st.DataObject) -> None:
    """Also where text is held back, and after bytes that are no character."""
    token_ids = data.draw(st.lists(st.integers(0, view.vocab_size - 1), max_size=30))
    detokenizer = Detokenizer(view, stop=["never said"])
    offsets = []
    for token_id in token_ids:
        detokenizer.push(token_id)
        offsets.append(detokenizer.offset)
    detokenizer.finish()
    for token_id, offset in zip(token_ids, offsets, strict=True):
        own = view.bytes_of(token_id).decode(errors="replace")
        if not view.is_special(token_id) and "\ufffd" not in own:
            assert detokenizer.text[offset:].startswith(own)


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


def test_special_tokens_that_are_shown_are_text() -> None:
    tokens = [*encode("a"), EOS_ID, *encode("b"), EOS_ID]
    for shown, text in ((), "ab"), ((EOS_ID,), "a</s>b"):
        detokenizer = Detokenizer(VIEW, shown=shown)
        pushed = [detokenizer.push(one, ends=i == 3) for i, one in enumerate(tokens)]
        assert "".join(pushed) + detokenizer.finish() == text


def test_added_tokens_that_are_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    assert TokenizerView(tokenizer).word_ids == {300}
    assert TokenizerView(tokenizer, num_embeddings=300).word_ids == frozenset()
