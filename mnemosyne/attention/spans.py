"""A segment cut into spans: rows times keys that one plain attention call can compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from mnemosyne.attention.segments import Segment, slot_runs

MAX_ROWS = 4096  # rows of a tile: bounds the temporaries of a chunk
WINDOW_ROWS = 256  # the same under a sliding window: bounds the masks of its edges


class Sight(Enum):
    """The keys of a span that its rows see."""

    FULL = "full"  # all
    CAUSAL = "causal"  # as many rows as keys, at the same positions: those not after the row
    BAND = "band"  # those in the row's window


@dataclass(frozen=True, slots=True)
class Span:
    """Rows and keys as ranges of positions. Every row sees at least one of the keys."""

    rows: range
    keys: range
    sight: Sight


def row_tiles(segment: Segment, window: int | None) -> Iterator[range]:
    """The positions of a segment's rows, in tiles of bounded size."""
    stop = segment.first_position + segment.num_rows
    tile_rows = MAX_ROWS if window is None else WINDOW_ROWS
    for start in range(segment.first_position, stop, tile_rows):
        yield range(start, min(start + tile_rows, stop))


def cut_tile(rows: range, keys: range, window: int | None) -> list[Span]:
    """Cut the visible part of rows x keys into spans that do not overlap.

    Args:
        rows: positions of consecutive query rows, at least one.
        keys: positions of the local keys; may be empty, or begin or end anywhere.
        window: a row at p sees the keys after ``p - window``; None: all of them.

    Returns:
        The spans, one that holds all rows first if there is one; none if no row sees a key.
    """
    if window is not None and window < len(rows):
        keys = _clip(keys, rows.start - window + 1, rows.stop)
        rows = _clip(rows, keys.start, keys.stop - 1 + window)
        return _drop_empty([Span(rows, keys, Sight.BAND)])
    # One row sees its own key like any other; several see their own keys causally.
    own = rows.start if len(rows) > 1 else rows.stop
    past = _clip(keys, keys.start if window is None else rows.stop - window, own)
    later = _clip(keys, own, rows.stop)
    spans = [
        Span(rows, past, Sight.FULL),
        Span(_clip(rows, later.start, later.stop), later, Sight.CAUSAL),
        Span(_clip(rows, later.stop, rows.stop), later, Sight.FULL),
    ]
    if window is not None:
        edge = _clip(keys, rows.start - window + 1, rows.stop - window)
        edge_rows = _clip(rows, rows.start, edge.stop - 1 + window)
        spans.append(Span(edge_rows, edge, Sight.BAND))
    return _drop_empty(spans)


def key_runs(pages: np.ndarray, keys: range, page_size: int) -> Iterator[tuple[int, int]]:
    """Maximal runs of neighbouring slots that hold a range of local keys.

    Args:
        pages: int64 page ids in key order.
        keys: local keys, at least one.
        page_size: tokens per page.

    Yields:
        ``(first_slot, length)`` of each run, in key order.
    """
    first_page = keys.start // page_size
    skipped = keys.start - first_page * page_size
    num_keys = keys.stop - first_page * page_size
    for first_key, first_slot, length in slot_runs(pages[first_page:], num_keys, page_size):
        trim = skipped if first_key == 0 else 0
        yield first_slot + trim, length - trim


def _clip(positions: range, start: int, stop: int) -> range:
    start = max(positions.start, start)
    return range(start, max(start, min(positions.stop, stop)))


def _drop_empty(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.rows and span.keys]
