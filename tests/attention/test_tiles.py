"""Tiles and items hold every key of every row once, wherever they are cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.attention import Segment
from mnemosyne.attention.tiles import (
    ROW,
    START,
    STOP,
    cut_rows,
    of_whole_blocks,
    split_keys,
)

BLOCK = 16
PAGES = np.zeros(40, dtype=np.int64)


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    """Chunks and decodes, shards among them that end before their rows or begin after."""
    found: list[Segment] = []
    for _ in range(draw(st.integers(1, 4))):
        num_rows = draw(st.integers(1, 60))
        position = draw(st.integers(0, 400))
        stop = draw(st.integers(0, position + num_rows)) if draw(st.booleans()) else None
        stop = position + num_rows if stop is None else stop
        first_key = draw(st.integers(0, stop)) if draw(st.booleans()) else 0
        first_row = found[-1].first_row + found[-1].num_rows if found else 0
        segment = Segment(first_row, num_rows, position, stop - first_key, PAGES, first_key)
        found.append(segment)
    return found


@given(
    segments=segments(),
    num_shares=st.integers(1, 40),
    min_keys=st.integers(1, 100),
    whole_blocks=st.booleans(),
)
def test_items_hold_the_keys_of_their_tile_and_partials_of_their_own(
    segments: list[Segment], num_shares: int, min_keys: int, whole_blocks: bool
) -> None:
    tiles = cut_rows(segments, 8, None)

    items, merges, num_partials = split_keys(
        tiles, num_shares=num_shares, min_keys=min_keys, block=BLOCK, whole_blocks=whole_blocks
    )

    for tile in tiles:
        mine = items[items[:, 0] == tile[ROW]]
        mine = mine[np.argsort(mine[:, 4])]
        edges = [*mine[:, 4], tile[STOP]]
        assert edges == [tile[START], *mine[:, 5]]
        assert (mine[:, 4] < mine[:, 5]).all()
        assert (mine[:, 7] == (len(mine) == 1)).all()
    rows = [item[6] + row for item in items[items[:, 7] == 0] for row in range(item[1])]
    assert sorted(rows) == list(range(num_partials))
    owners = {
        first_partial + row: first_row + row
        for first_row, num_rows, _, _, _, _, first_partial, is_whole in items.tolist()
        if not is_whole
        for row in range(num_rows)
    }
    for row, first_partial, num_parts, stride in merges.tolist():
        for part in range(num_parts):
            assert owners.pop(first_partial + part * stride) == row
    assert not owners
    num_keys = items[:, 5] - items[:, 4]
    assert (np.diff(num_keys) <= 0).all()  # the longest first: nobody waits for it at the end


def test_whole_blocks_end_where_the_first_row_sees_no_more() -> None:
    tiles = cut_rows([Segment(0, 40, 100, 140, PAGES)], 8, None)

    items, _, _ = split_keys(tiles, num_shares=1, min_keys=64, block=BLOCK, whole_blocks=True)

    whole = items[of_whole_blocks(items, BLOCK)]
    assert len(whole) == len(tiles) == 5
    for item in whole:
        position = 100 + item[0]
        assert item[4] == 0
        assert item[5] == (position + 1) // BLOCK * BLOCK


def test_short_tiles_are_not_cut_at_their_own_keys() -> None:
    tiles = cut_rows([Segment(0, 40, 100, 140, PAGES)], 8, None)

    items, merges, _ = split_keys(tiles, num_shares=1, min_keys=129, block=BLOCK, whole_blocks=True)

    assert len(items) == len(tiles)
    assert not len(merges)
