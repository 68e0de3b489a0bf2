"""The bytes that each token of a vocabulary stands for."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from dynamic_lora_server.errors import UnsupportedModel

# Steps of a decoder after which each token, behind another, has a text of its own. ByteLevel is
# such a step too, but not together with these.
_KNOWN = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """What tokens add to a text, in bytes: one after another they are the text's UTF-8.

    A token may be a part of a character, so bytes add up where texts do not. They are those of a
    token with text before it: many decoders drop the space that begins a text.

    Raises UnsupportedModel for a decoder by which a token's text depends on its neighbours.
    """

    def __init__(self, backend: Tokenizer) -> None:
        steps = _steps(backend)
        self._backend = backend
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        known = {"ByteLevel", "Fuse"} if self._byte_level else _KNOWN
        if not steps <= known:
            raise UnsupportedModel(
                f"The tokenizer decodes by {', '.join(sorted(steps))}; what a token reads as "
                "cannot be told from the token alone."
            )
        self._anchor, self._anchor_text = self._find_anchor()
        self._of = lru_cache(maxsize=65536)(self._read)

    def of(self, token_id: int) -> bytes:
        """The bytes of one token, a special token's name included; none for an unknown id."""
        return self._of(token_id)

    def _read(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return _from_byte_level(token)
        fallback = _FALLBACK.fullmatch(token) if self._byte_fallback else None
        if fallback is not None:
            return bytes.fromhex(fallback[1])
        text = self._backend.decode([self._anchor, token_id], skip_special_tokens=False)
        return text[len(self._anchor_text) :].encode()

    def _find_anchor(self) -> tuple[int, str]:
        """A token that decoders leave as it is, to put before others, and its text."""
        for token_id in range(self._backend.get_vocab_size(with_added_tokens=True)):
            text = self._backend.decode([token_id], skip_special_tokens=False)
            if text and text == text.strip():
                return token_id, text
        raise UnsupportedModel("The tokenizer has no token with a visible text.")


def _steps(backend: Tokenizer) -> set[str]:
    """The types of a decoder's steps; none where tokens are joined by spaces."""
    if backend.decoder is None:
        return set()
    return set(_types(json.loads(backend.decoder.__getstate__())))


def _types(decoder: Mapping[str, Any]) -> Iterator[str]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _types(step)
    else:
        yield decoder["type"]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: a printable byte is its own character, the others follow from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()  # an added token, written as it reads
