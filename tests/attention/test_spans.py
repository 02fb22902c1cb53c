"""Spans cover what rows may see, exactly and once, in tiles of bounded size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.attention.segments import Segment
from mnemosyne.attention.spans import (
    MAX_ROWS,
    WINDOW_ROWS,
    Sight,
    Span,
    cut_tile,
    key_runs,
    row_tiles,
)
from mnemosyne.cache.layout import slots_of

positions = st.integers(0, 60)
lengths = st.integers(0, 40)
windows = st.one_of(st.none(), st.integers(1, 70))


def may_see(row: int, key: int, window: int | None) -> bool:
    return key <= row and (window is None or key > row - window)


def pairs(span: Span, window: int | None) -> set[tuple[int, int]]:
    """Row and key positions that the span's rows see, by what its sight promises."""
    every = {(row, key) for row in span.rows for key in span.keys}
    if span.sight is Sight.FULL:
        return every
    if span.sight is Sight.CAUSAL:
        assert span.rows == span.keys, "torch's causal mask is aligned at the first row and key"
        return {(row, key) for row, key in every if key <= row}
    return {(row, key) for row, key in every if may_see(row, key, window)}


@given(positions, lengths, positions, lengths, windows)
def test_spans_cover_what_rows_see_exactly_once(
    first_row: int, num_rows: int, first_key: int, num_keys: int, window: int | None
) -> None:
    rows = range(first_row, first_row + num_rows + 1)
    keys = range(first_key, first_key + num_keys)

    covered = [pairs(span, window) for span in cut_tile(rows, keys, window)]

    expected = {(row, key) for row in rows for key in keys if may_see(row, key, window)}
    assert set().union(*covered) == expected
    assert sum(map(len, covered)) == len(expected)


@given(positions, lengths, positions, lengths, windows)
def test_every_row_of_a_span_sees_a_key_and_every_key_is_seen(
    first_row: int, num_rows: int, first_key: int, num_keys: int, window: int | None
) -> None:
    # The operator gives garbage for a row that is masked everywhere.
    rows = range(first_row, first_row + num_rows + 1)
    keys = range(first_key, first_key + num_keys)

    for span in cut_tile(rows, keys, window):
        seen = pairs(span, window)
        assert {row for row, _ in seen} == set(span.rows)
        assert {key for _, key in seen} == set(span.keys)


@given(st.integers(0, 100), st.integers(1, 3 * MAX_ROWS), windows)
def test_tiles_are_bounded_and_hold_every_row_once(
    first_position: int, num_rows: int, window: int | None
) -> None:
    segment = Segment(0, num_rows, first_position, 0, np.zeros(0, dtype=np.int64))

    tiles = list(row_tiles(segment, window))

    assert [row for tile in tiles for row in tile] == list(
        range(first_position, first_position + num_rows)
    )
    assert max(map(len, tiles)) <= (MAX_ROWS if window is None else WINDOW_ROWS)


def test_masks_of_a_wide_window_are_no_wider_than_a_tile() -> None:
    rows = range(10_000, 10_000 + WINDOW_ROWS)

    spans = cut_tile(rows, range(20_000), window=4096)

    masked = [span for span in spans if span.sight is Sight.BAND]
    assert [len(span.keys) for span in masked] == [WINDOW_ROWS - 1]


@given(st.lists(st.integers(0, 200), unique=True, min_size=1, max_size=30), st.data())
def test_runs_are_maximal_and_hold_the_slots_in_order(ids: list[int], data: st.DataObject) -> None:
    page_size = 4
    pages = np.array(ids, dtype=np.int64)
    start = data.draw(st.integers(0, len(ids) * page_size - 1))
    stop = data.draw(st.integers(start + 1, len(ids) * page_size))

    runs = list(key_runs(pages, range(start, stop), page_size))

    slots = [slot for first, length in runs for slot in range(first, first + length)]
    assert slots == slots_of(pages, start, stop - start, page_size).tolist()
    assert all(a + n != b for (a, n), (b, _) in pairwise(runs))
