"""The work list of the Triton kernels: a batch's rows in tiles of one adapter each. No torch."""

from collections.abc import Iterable

# Rows of a tile: the least that a tensor core's product takes, and what pays
# for segments of a long prefill. 64 rows are multiplied by other instructions on Hopper (WGMMA),
# which Triton 3.7.1 may compile wrongly (triton-lang/triton#11366).
SHORT = 16
LONG = 32


def tile_rows(max_length: int) -> int:
    """Rows of a tile for segments of at most `max_length` rows."""
    return LONG if max_length > LONG else SHORT


def tiles_of(segments: Iterable[tuple[int | None, int]], num_rows: int) -> list[int]:
    """Cut consecutive segments `(slot, length)` into tiles of up to `num_rows` rows.

    Rows of slot None get no tile. Returns the number of tiles, then for each
    its first row, its number of rows and its slot: at most `1 + 3 * rows` in all.
    """
    tiles: list[int] = []
    start = 0
    for slot, length in segments:
        if slot is not None:
            for first in range(start, start + length, num_rows):
                tiles += (first, min(num_rows, start + length - first), slot)
        start += length
    return [len(tiles) // 3, *tiles]
