from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_client.sse import SseDecoder

_LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)


@given(
    events=st.lists(st.lists(_LINES, min_size=1, max_size=3), max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 200)),
)
def test_events_survive_any_cut(events: list[list[str]], end: str, cuts: list[int]) -> None:
    lines = [line for event in events for line in [*(f"data: {part}" for part in event), ""]]
    stream = "".join(line + end for line in lines).encode() + b": the end\n"
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    decoder = SseDecoder()
    seen = [
        data
        for start, stop in zip(edges, edges[1:], strict=False)
        for data in decoder.feed(stream[start:stop])
    ]
    assert seen == ["\n".join(event) for event in events]


def test_other_fields_comments_and_unfinished_events_give_nothing() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b": ping\n\nevent: x\nid: 4\n\ndata: unfinished\n") == []


def test_line_separator_in_the_data_does_not_cut_it() -> None:
    assert SseDecoder().feed("data:a\u2028b\x85c\n\n".encode()) == ["a\u2028b\x85c"]
