"""The tokens of prompts that are given back with their log-probabilities."""

import gc
import tracemalloc
from collections.abc import Iterator

from dynamic_lora_server.engine.sampling.sampler import Sampled
from dynamic_lora_server.serving.pieces import PromptPieces
from tests.support.grammars import VIEW


def test_pieces_are_what_was_told_each_time_they_are_read() -> None:
    text = "the king é"
    first, *others = VIEW.encode(text, add_special_tokens=False)
    told = [
        Sampled(token_id, -0.5 * at, ((9, -0.25), (token_id, -0.5 * at)))
        for at, token_id in enumerate(others)
    ]
    pieces = PromptPieces(VIEW, index=3, text=text, first_id=first)
    pieces.add(told[:2])
    pieces.add(told[2:])
    for _ in range(2):
        found = list(pieces)
        assert [piece.token_id for piece in found] == [first, *others]
        assert [piece.logprob for piece in found] == [None, *(one.logprob for one in told)]
        beside = [[(top.token_id, top.logprob) for top in piece.top] for piece in found]
        assert beside == [[], *(list(one.top) for one in told)]
        assert {piece.index for piece in found} == {3}
        for piece in found:
            if "\ufffd" not in piece.token_text:
                assert text.startswith(piece.token_text, piece.offset)
    assert b"".join(piece.token_bytes for piece in found).decode() == text


def test_a_prompt_takes_few_bytes_a_token() -> None:
    number, likely = 2000, 20
    pieces = PromptPieces(VIEW, index=0, text="", first_id=5)

    def told() -> Iterator[Sampled]:
        for at in range(number):
            yield Sampled(at, -1.5, tuple((at + i, -0.1 * i) for i in range(likely)))

    tracemalloc.start()
    try:
        pieces.add(told())
        gc.collect()  # Python keeps some of what it frees
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / number < 1.2 * 8 * (1 + likely)
