from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.tiles import LONG, SHORT, tile_rows, tiles_of

SEGMENTS = st.lists(st.tuples(st.none() | st.integers(0, 5), st.integers(1, 40)), max_size=8)


def test_tiles_are_counted_and_named() -> None:
    assert tiles_of([(3, 5), (None, 2), (0, 1)], 4) == [3, 0, 4, 3, 4, 1, 3, 7, 1, 0]


@given(segments=SEGMENTS, num_rows=st.sampled_from([1, 4, 16]))
def test_every_row_of_a_slot_is_in_one_tile(
    segments: list[tuple[int | None, int]], num_rows: int
) -> None:
    expected = [slot for slot, length in segments for _ in range(length)]
    number, *tiles = tiles_of(segments, num_rows)
    assert len(tiles) == 3 * number
    found: list[int | None] = [None] * len(expected)
    for first, count, slot in zip(*[iter(tiles)] * 3, strict=True):
        assert 1 <= count <= num_rows
        for row in range(first, first + count):
            assert found[row] is None
            found[row] = slot
    assert found == expected


def test_only_long_segments_get_large_tiles() -> None:
    assert tile_rows(LONG) == SHORT
    assert tile_rows(LONG + 1) == LONG
