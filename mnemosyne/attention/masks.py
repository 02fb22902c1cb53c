"""The page tables of a step as the sparse tables of a FlexAttention block mask, in O(pages)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.segments import Segment

QUERY_BLOCK = 128  # queries per block; a row has as many queries as heads share its KV head
MAX_BATCH = 256  # rows of ``bounds_B3``: decodes per call
MIN_POSITIONS = 4096  # entries of the smallest page -> position table
NO_WINDOW = 2**62  # further back than any position
FEW_PAGES = 1024  # decodes of fewer pages share a call, however much they differ


@dataclass(frozen=True, slots=True, eq=False)
class PageBlocks:
    """Pages that each block of queries reads: M blocks in each of B batch entries.

    A page is full where every row of the block sees all of it, partial where a mask must decide.
    The mask knows the rows of batch entry b by ``bounds_B3[b]``: position of the first row, end
    of the keys, window.
    """

    num_partial: Tensor  # int32 [B, 1, M]
    partial: Tensor  # int32 [B, 1, M, W], page ids
    num_full: Tensor  # int32 [B, 1, M]
    full: Tensor  # int32 [B, 1, M, W], page ids
    bounds_B3: Tensor  # int64 [MAX_BATCH, 3]


@dataclass(frozen=True, slots=True, eq=False)
class _Reads:
    """Local page indices, start and stop, that each of M blocks reads, and the full ones of it."""

    read_M2: np.ndarray
    full_M2: np.ndarray


def chunk_blocks(
    segment: Segment, window: int | None, *, page_size: int, group: int, device: torch.device
) -> PageBlocks:
    """Tables of one segment, the ``num_rows * group`` queries of a KV head cut into blocks.

    Args:
        segment: the rows and their keys, one of either at least.
        window: sliding window, or None: then all blocks share one list of full pages (stride 0),
            of which each reads a prefix.
        page_size: tokens per page.
        group: query heads per KV head.
        device: where the tables go.

    Returns:
        Tables with B = 1. M is at least 2; blocks past the end read nothing.
    """
    num_queries = segment.num_rows * group
    first_query = np.arange(0, num_queries, QUERY_BLOCK, dtype=np.int64)
    last_query = np.minimum(first_query + QUERY_BLOCK, num_queries) - 1
    reads = _reads(
        segment.first_position + first_query // group,
        segment.first_position + last_query // group,
        np.array([[segment.first_key, segment.first_key + segment.num_keys]]),
        window,
        page_size,
    )
    num_blocks = max(2, len(first_query))
    width = _partial_width(QUERY_BLOCK // group + 1, page_size)
    pages = [segment.pages] * len(first_query)
    num_partial, partial = _partial_table(pages, reads, num_blocks, width)
    if window is None:
        last = int(reads.full_M2[:, 1].argmax())
        whole = _Reads(reads.read_M2[last : last + 1], reads.full_M2[last : last + 1])
        _, one_row = _full_table(pages[:1], whole, 1)
        full = torch.from_numpy(one_row).to(device).expand(num_blocks, -1)
        num_full = np.zeros(num_blocks, dtype=np.int32)
        num_full[: len(first_query)] = reads.full_M2[:, 1]
    else:
        num_full, table = _full_table(pages, reads, num_blocks)
        full = torch.from_numpy(table).to(device)
    return PageBlocks(
        num_partial=torch.from_numpy(num_partial).to(device)[None, None],
        partial=torch.from_numpy(partial).to(device)[None, None],
        num_full=torch.from_numpy(num_full).to(device)[None, None],
        full=full[None, None],
        bounds_B3=_bounds([segment], window).to(device),
    )


def decode_blocks(
    segments: Sequence[Segment],
    window: int | None,
    *,
    page_size: int,
    num_entries: int,
    device: torch.device,
) -> PageBlocks:
    """Tables of segments of one row each, one batch entry per segment.

    Args:
        segments: at most ``num_entries``.
        window: sliding window, or None.
        page_size: tokens per page.
        num_entries: B; entries past the segments read nothing.
        device: where the tables go.

    Returns:
        Tables with B = ``num_entries`` and M = 1.
    """
    position = np.array([segment.first_position for segment in segments], dtype=np.int64)
    keys = np.array([(s.first_key, s.first_key + s.num_keys) for s in segments], dtype=np.int64)
    reads = _reads(position, position, keys, window, page_size)
    pages = [segment.pages for segment in segments]
    width = _partial_width(1, page_size)
    num_partial, partial = _partial_table(pages, reads, num_entries, width)
    num_full, full = _full_table(pages, reads, num_entries)
    return PageBlocks(
        num_partial=torch.from_numpy(num_partial).to(device)[:, None, None],
        partial=torch.from_numpy(partial).to(device)[:, None, None],
        num_full=torch.from_numpy(num_full).to(device)[:, None, None],
        full=torch.from_numpy(full).to(device)[:, None, None],
        bounds_B3=_bounds(segments, window).to(device),
    )


def decode_groups(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments that may share a call: at most MAX_BATCH, and of similar length if long.

    The tables of a call are as wide as its longest segment, so a long one goes with its like.
    """
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        groups.setdefault((len(segment.pages) // FEW_PAGES).bit_length(), []).append(segment)
    for group in groups.values():
        for start in range(0, len(group), MAX_BATCH):
            yield group[start : start + MAX_BATCH]


def page_positions(
    segments: Sequence[Segment], *, page_size: int, num_pages: int, device: torch.device
) -> Tensor:
    """Position of the first key of every page that a segment reads, by page id.

    Args:
        segments: with one key at least.
        page_size: tokens per page.
        num_pages: pages of the pool.
        device: where the table goes.

    Returns:
        int64; longer than ``num_pages``, so that pools of similar size share a compiled kernel.
    """
    used = [segment.pages[: -(-segment.num_keys // page_size)] for segment in segments]
    firsts = [
        segment.first_key + page_size * np.arange(len(pages), dtype=np.int64)
        for segment, pages in zip(segments, used, strict=True)
    ]
    length = max(MIN_POSITIONS, 1 << num_pages.bit_length())
    positions = torch.zeros(length, dtype=torch.int64, device=device)
    pages = torch.from_numpy(np.concatenate(used)).to(device)
    positions[pages] = torch.from_numpy(np.concatenate(firsts)).to(device)
    return positions


def _reads(
    first_row: np.ndarray, last_row: np.ndarray, keys_M2: np.ndarray, window: int | None, size: int
) -> _Reads:
    """Pages for blocks of rows from one position to another, over keys from start to stop."""
    start, stop = keys_M2.T
    reach = NO_WINDOW if window is None else window
    seen_by_some = np.maximum(start, first_row - reach + 1), np.minimum(stop, last_row + 1)
    seen_by_all = np.maximum(start, last_row - reach + 1), np.minimum(stop, first_row + 1)
    read_start = (seen_by_some[0] - start) // size
    read_stop = np.where(
        seen_by_some[1] > seen_by_some[0], -(-(seen_by_some[1] - start) // size), read_start
    )
    full_start = np.minimum(-(-(seen_by_all[0] - start) // size), read_stop)
    full_stop = np.maximum((seen_by_all[1] - start) // size, full_start)
    return _Reads(
        np.stack((read_start, read_stop), axis=1), np.stack((full_start, full_stop), axis=1)
    )


def _partial_width(rows_per_block: int, page_size: int) -> int:
    """Most partial pages of a block: those its first and last rows see differently, two edges."""
    return 2 * (rows_per_block // page_size) + 6


def _partial_table(
    pages: Sequence[np.ndarray], reads: _Reads, num_blocks: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    count = np.zeros(num_blocks, dtype=np.int32)
    table = np.zeros((num_blocks, width), dtype=np.int32)
    ranges = zip(pages, reads.read_M2.tolist(), reads.full_M2.tolist(), strict=True)
    for block, (ids, (read_start, read_stop), (full_start, full_stop)) in enumerate(ranges):
        num_left, num_right = full_start - read_start, read_stop - full_stop
        count[block] = num_left + num_right
        table[block, :num_left] = ids[read_start:full_start]
        table[block, num_left : num_left + num_right] = ids[full_stop:read_stop]
    return count, table


def _full_table(
    pages: Sequence[np.ndarray], reads: _Reads, num_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    count = np.zeros(num_blocks, dtype=np.int32)
    count[: len(pages)] = reads.full_M2[:, 1] - reads.full_M2[:, 0]
    table = np.zeros((num_blocks, max(2, int(count.max()))), dtype=np.int32)
    for block, (ids, (start, stop)) in enumerate(zip(pages, reads.full_M2.tolist(), strict=True)):
        table[block, : stop - start] = ids[start:stop]
    return count, table


def _bounds(segments: Sequence[Segment], window: int | None) -> Tensor:
    bounds_B3 = np.zeros((MAX_BATCH, 3), dtype=np.int64)
    reach = NO_WINDOW if window is None else window
    for entry, segment in enumerate(segments):
        stop = segment.first_key + segment.num_keys
        bounds_B3[entry] = segment.first_position, stop, reach
    return torch.from_numpy(bounds_B3)
