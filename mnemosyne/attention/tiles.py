"""The segments of a step as work for the Triton kernels: tiles of rows, their keys split evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnemosyne.attention.segments import Segment

# Columns of a tile: first row, rows, local key of the first row, first page, key start, key stop.
ROW, ROWS, OWN_KEY, PAGE, START, STOP = range(6)


def cut_rows(segments: Sequence[Segment], tile_rows: int, window: int | None) -> np.ndarray:
    """Tiles of at most ``tile_rows`` rows, each with the local keys that one of its rows sees.

    Args:
        segments: their page ids follow each other in one table.
        tile_rows: most rows of a tile.
        window: sliding window, or None.

    Returns:
        int64 [tiles, 6]; tiles that see no key are left out.
    """
    num_tiles = np.array(
        [-(-segment.num_rows // tile_rows) for segment in segments], dtype=np.int64
    )
    fields = np.array(
        [
            (s.first_row, s.num_rows, s.first_position - s.first_key, len(s.pages), s.num_keys)
            for s in segments
        ],
        dtype=np.int64,
    ).reshape(-1, 5)
    first_page = np.cumsum(fields[:, 3]) - fields[:, 3]
    owner = np.repeat(np.arange(len(segments)), num_tiles)
    first_tile = np.cumsum(num_tiles) - num_tiles
    offset = (np.arange(len(owner)) - first_tile[owner]) * tile_rows
    rows = np.minimum(tile_rows, fields[owner, 1] - offset)
    own_key = fields[owner, 2] + offset
    stop = np.minimum(fields[owner, 4], own_key + rows)
    start = np.zeros_like(stop) if window is None else np.maximum(0, own_key - window + 1)
    tiles = np.stack(
        (fields[owner, 0] + offset, rows, own_key, first_page[owner], start, stop), axis=1
    )
    return tiles[stop > start]


def split_keys(
    tiles: np.ndarray, *, num_shares: int, min_keys: int, block: int, merge_all: bool = False
) -> tuple[np.ndarray, np.ndarray, int]:
    """Cut the keys of long tiles so that no item holds much more than its share of all keys.

    A launch of one long sequence and many short ones is as even as one of equal ones: the long
    one alone is cut, into as many items as its length asks for.

    Args:
        tiles: from ``cut_rows``.
        num_shares: items wanted; the GPU's processors, or some per processor, over the KV heads.
        min_keys: keys below which a cut does not pay.
        block: cuts fall on multiples of it.
        merge_all: tiles that are not cut leave a partial too, so that every row is merged.

    Returns:
        ``(items, merges, num_partials)`` as ``mnemosyne.kernels.tile.Tiles`` has them, the
        longest items first; no more of them than ``most_items``.
    """
    keys = tiles[:, STOP] - tiles[:, START]
    share = max(min_keys, -(-int(keys.sum()) // max(1, num_shares)))
    first_block = tiles[:, START] // block
    num_blocks = -(-tiles[:, STOP] // block) - first_block
    parts = np.minimum(-(-keys // share), num_blocks)
    tile = np.repeat(np.arange(len(tiles)), parts)
    part = np.arange(len(tile)) - (np.cumsum(parts) - parts)[tile]
    edges = [
        (first_block[tile] + num_blocks[tile] * index // parts[tile]) * block
        for index in (part, part + 1)
    ]
    cut = parts > (0 if merge_all else 1)
    rows = tiles[:, ROWS] * cut  # of partials, per part
    first_partial = np.cumsum(rows * parts) - rows * parts
    items = np.empty((len(tile), 8), dtype=np.int64)
    items[:, :4] = tiles[tile, :4]
    items[:, 4] = np.maximum(edges[0], tiles[tile, START])
    items[:, 5] = np.minimum(edges[1], tiles[tile, STOP])
    items[:, 6] = first_partial[tile] + part * rows[tile]
    items[:, 7] = ~cut[tile]
    items = items[np.argsort(items[:, 4] - items[:, 5], kind="stable")]
    merged = np.repeat(np.flatnonzero(cut), tiles[cut, ROWS])
    row = np.arange(len(merged)) - (np.cumsum(rows) - rows)[merged]
    merges = np.stack(
        (tiles[merged, ROW] + row, first_partial[merged] + row, parts[merged], rows[merged]),
        axis=1,
    )
    return items, merges, int((rows * parts).sum())


def most_items(num_tiles: int, num_shares: int) -> int:
    """Items that ``split_keys`` gives at most, whatever the lengths of so many tiles."""
    return num_tiles + max(1, num_shares) - 1


def page_table(segments: Sequence[Segment]) -> np.ndarray:
    """Page ids of all segments, one segment after the other, int32."""
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *(segment.pages for segment in segments)]).astype(np.int32)
