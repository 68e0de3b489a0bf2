"""Bytes of tokens, for the decoders that tokenizer files name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel

from dynamic_lora_server.errors import UnsupportedModel
from dynamic_lora_server.token_bytes import TokenBytes
from tests.support.models import sentencepiece_tokenizer, tiny_tokenizer

PIECES = ["<unk>", "▁the", "▁", "▁▁", "ing", "é", "##ing", "a b", ".", "▁Paris"]


def words(decoder: decoders.Decoder | None) -> Tokenizer:
    backend = Tokenizer(WordLevel({piece: i for i, piece in enumerate(PIECES)}, "<unk>"))
    backend.decoder = decoder
    return backend


BACKENDS = {
    "byte level": tiny_tokenizer().backend_tokenizer,
    "SentencePiece": sentencepiece_tokenizer().backend_tokenizer,
    "Gemma": words(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "Metaspace": words(decoders.Metaspace()),
    "nested": words(decoders.Sequence([decoders.Sequence([decoders.Metaspace()])])),
    "WordPiece": words(decoders.WordPiece()),
    "none": words(None),
}


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_tokens_add_to_a_text_what_the_decoder_adds(name: str, data: st.DataObject) -> None:
    backend = BACKENDS[name]
    of = TokenBytes(backend).of
    ids = st.integers(0, backend.get_vocab_size() - 1)
    if name == "SentencePiece":
        # Beside bytes that are no character, tokenizers garbles those that are.
        ids = ids.filter(lambda i: of(i) < b"\x80")
    first = next(i for i in range(backend.get_vocab_size()) if of(i).strip())
    answer = data.draw(st.lists(ids, max_size=12))
    before = backend.decode([first], skip_special_tokens=False)
    whole = backend.decode([first, *answer], skip_special_tokens=False)
    assert before + b"".join(map(of, answer)).decode(errors="replace") == whole


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_tokenizer])
def test_parts_of_a_character_are_their_bytes(make: object) -> None:
    assert callable(make)
    backend = make().backend_tokenizer
    of = TokenBytes(backend).of
    ids = backend.encode("x 🙂é", add_special_tokens=False).ids
    assert b"".join(map(of, ids)).decode().lstrip() == "x 🙂é"
    assert [of(token_id) for token_id in ids[-2:]] == [b"\xc3", b"\xa9"]


def test_a_token_of_a_byte_is_a_text_where_the_decoder_says_nothing_of_bytes() -> None:
    backend = Tokenizer(WordLevel({"a": 0, "<0x41>": 1}, "a"))
    backend.decoder = decoders.Fuse()
    assert TokenBytes(backend).of(1) == b"<0x41>"


def test_an_added_token_that_is_not_written_in_bytes_reads_as_it_is() -> None:
    backend = tiny_tokenizer().backend_tokenizer
    backend.add_tokens(["   "])
    (spaces,) = backend.encode("   ", add_special_tokens=False).ids
    assert TokenBytes(backend).of(spaces) == b"   "


def test_an_id_that_no_token_has_adds_nothing() -> None:
    assert TokenBytes(BACKENDS["byte level"]).of(10**6) == b""
    assert TokenBytes(BACKENDS["SentencePiece"]).of(10**6) == b""


@pytest.mark.parametrize(
    ("decoder", "names"),
    [
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), "ByteLevel, Strip"),
    ],
)
def test_tokens_that_read_differently_by_their_neighbours_are_refused(
    decoder: decoders.Decoder | None, names: str
) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        TokenBytes(words(decoder))


def test_a_vocabulary_of_spaces_is_refused() -> None:
    backend = Tokenizer(BPE(vocab={"▁": 0}, merges=[]))
    backend.decoder = decoders.Metaspace()
    with pytest.raises(UnsupportedModel, match="no token with a visible text"):
        TokenBytes(backend)
