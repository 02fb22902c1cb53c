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
        segments: each knows where its page ids begin.
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
            (s.first_row, s.num_rows, s.first_position - s.first_key, s.page_of_key_0, s.num_keys)
            for s in segments
        ],
        dtype=np.int64,
    ).reshape(-1, 5)
    owner = np.repeat(np.arange(len(segments)), num_tiles)
    first_tile = np.cumsum(num_tiles) - num_tiles
    offset = (np.arange(len(owner)) - first_tile[owner]) * tile_rows
    rows = np.minimum(tile_rows, fields[owner, 1] - offset)
    own_key = fields[owner, 2] + offset
    stop = np.minimum(fields[owner, 4], own_key + rows)
    start = np.zeros_like(stop) if window is None else np.maximum(0, own_key - window + 1)
    tiles = np.stack(
        (fields[owner, 0] + offset, rows, own_key, fields[owner, 3], start, stop), axis=1
    )
    return tiles[stop > start]


def cut_at_own_keys(tiles: np.ndarray, *, min_keys: int, block: int) -> tuple[np.ndarray, ...]:
    """Part the whole blocks that every row of a tile sees from the rest of its keys.

    Args:
        tiles: from ``cut_rows``, without a window.
        min_keys: of whole blocks, below which a tile stays as it is.
        block: keys of a block.

    Returns:
        ``(pieces, tile)``: rows like those of ``tiles`` and which tile each is a piece of, pieces
        of a tile next to each other.
    """
    seen_by_all = np.minimum(tiles[:, STOP], tiles[:, OWN_KEY] + 1) // block * block
    first_block = -(-tiles[:, START] // block) * block
    cut = (seen_by_all - first_block >= min_keys) & (tiles[:, START] == first_block)
    tile = np.repeat(np.arange(len(tiles)), 1 + (cut & (seen_by_all < tiles[:, STOP])))
    pieces = tiles[tile]
    is_second = np.diff(tile, prepend=-1) == 0
    pieces[is_second, START] = seen_by_all[tile[is_second]]
    is_first = np.roll(is_second, -1)
    pieces[is_first, STOP] = seen_by_all[tile[is_first]]
    return pieces, tile


def split_keys(
    tiles: np.ndarray,
    *,
    num_shares: int,
    min_keys: int,
    block: int,
    merge_all: bool = False,
    whole_blocks: bool = False,
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
        whole_blocks: cut long tiles where not every row sees all keys of a block any more.

    Returns:
        ``(items, merges, num_partials)`` as ``mnemosyne.kernels.tile.Tiles`` has them, the
        longest items first; no more of them than ``most_items``.
    """
    pieces, owner = tiles, np.arange(len(tiles))
    if whole_blocks:
        pieces, owner = cut_at_own_keys(tiles, min_keys=min_keys, block=block)
    keys = pieces[:, STOP] - pieces[:, START]
    share = max(min_keys, -(-int(keys.sum()) // max(1, num_shares)))
    piece, starts, stops = _cut_at_blocks(pieces, share, block)
    tile = owner[piece]
    parts = np.bincount(tile, minlength=len(tiles))
    cut = parts > (0 if merge_all else 1)
    rows = tiles[:, ROWS] * cut  # of partials, per part
    first_partial = np.cumsum(rows * parts) - rows * parts
    items = np.empty((len(tile), 8), dtype=np.int64)
    items[:, :4] = tiles[tile, :4]
    items[:, 4], items[:, 5] = starts, stops
    items[:, 6] = first_partial[tile] + _index_in_run(tile, parts) * rows[tile]
    items[:, 7] = ~cut[tile]
    items = items[np.argsort(items[:, 4] - items[:, 5], kind="stable")]
    merged = np.repeat(np.flatnonzero(cut), tiles[cut, ROWS])
    row = _index_in_run(merged, rows)
    merges = np.stack(
        (tiles[merged, ROW] + row, first_partial[merged] + row, parts[merged], rows[merged]),
        axis=1,
    )
    return items, merges, int((rows * parts).sum())


def _cut_at_blocks(
    pieces: np.ndarray, share: int, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts of at most about ``share`` keys: the piece, the first key and the end of each."""
    keys = pieces[:, STOP] - pieces[:, START]
    first_block = pieces[:, START] // block
    num_blocks = -(-pieces[:, STOP] // block) - first_block
    parts = np.minimum(-(-keys // share), num_blocks)
    piece = np.repeat(np.arange(len(pieces)), parts)
    part = _index_in_run(piece, parts)
    starts, stops = (
        (first_block[piece] + num_blocks[piece] * index // parts[piece]) * block
        for index in (part, part + 1)
    )
    return piece, np.maximum(starts, pieces[piece, START]), np.minimum(stops, pieces[piece, STOP])


def _index_in_run(owner: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Counts from 0 within each run of equal owners; owner i has ``lengths[i]`` entries."""
    return np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]


def of_whole_blocks(items: np.ndarray, block: int) -> np.ndarray:
    """Which items hold whole blocks that all their rows see."""
    own_key, start, stop = items[:, 2], items[:, 4], items[:, 5]
    return (start % block == 0) & (stop % block == 0) & (stop <= own_key + 1)


def most_items(num_tiles: int, num_shares: int) -> int:
    """Items that ``split_keys`` gives at most, whatever the lengths of so many tiles."""
    return num_tiles + max(1, num_shares) - 1
