"""Block tables list what the page tables say: each page once, full where no mask is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.attention import Segment, masks
from mnemosyne.attention.masks import (
    PageBlocks,
    chunk_blocks,
    decode_blocks,
    decode_groups,
    page_positions,
)

CPU = torch.device("cpu")
SIZE = 4
NUM_PAGES = 64

segments = st.builds(
    lambda num_rows, first_position, num_keys, first_key, seed: Segment(
        first_row=0,
        num_rows=num_rows,
        first_position=first_position,
        num_keys=num_keys,
        pages=np.random.default_rng(seed).permutation(NUM_PAGES)[: -(-num_keys // SIZE)],
        first_key=first_key,
    ),
    num_rows=st.integers(1, 50),
    first_position=st.integers(0, 100),
    num_keys=st.integers(1, 150),
    first_key=st.sampled_from([0, 0, 1, 40, 90]),
    seed=st.integers(0, 100),
)
windows = st.one_of(st.none(), st.integers(1, 200))


def may_see(segment: Segment, row: int, key: int, window: int | None) -> bool:
    is_local = 0 <= key - segment.first_key < segment.num_keys
    return is_local and key <= row and (window is None or key > row - window)


def listed(
    blocks: PageBlocks, positions: torch.Tensor, entry: int, block: int
) -> tuple[list[range], list[range]]:
    """Key positions of the partial and of the full pages of a block."""

    def keys(table: torch.Tensor, count: torch.Tensor) -> list[range]:
        pages = table[entry, 0, block, : int(count[entry, 0, block])]
        return [range(first, first + SIZE) for first in positions[pages.long()].tolist()]

    return keys(blocks.partial, blocks.num_partial), keys(blocks.full, blocks.num_full)


def check_block(
    segment: Segment,
    rows: range,
    window: int | None,
    partial: list[range],
    full: list[range],
) -> None:
    pairs = {(row, key) for row in rows for key in range(300) if may_see(segment, row, key, window)}
    assert len({page.start for page in partial + full}) == len(partial) + len(full)
    covered = {(row, key) for page in full for row in rows for key in page}
    assert covered <= pairs, "a full page needs no mask"
    covered |= {pair for page in partial for pair in pairs if pair[1] in page}
    assert covered == pairs


@given(segments, windows, st.sampled_from([1, 3, 4]), st.sampled_from([8, 128]))
def test_blocks_of_a_chunk_list_what_their_rows_see(
    segment: Segment, window: int | None, group: int, query_block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "QUERY_BLOCK", query_block)
        blocks = chunk_blocks(segment, window, page_size=SIZE, group=group, device=CPU)
    positions = page_positions([segment], page_size=SIZE, num_pages=NUM_PAGES, device=CPU)

    num_queries = segment.num_rows * group
    for block in range(blocks.num_full.shape[2]):
        queries = range(block * query_block, min(num_queries, (block + 1) * query_block))
        partial, full = listed(blocks, positions, 0, block)
        if not queries:
            assert not partial
            assert not full
            continue
        first, last = queries[0] // group, queries[-1] // group
        rows = range(segment.first_position + first, segment.first_position + last + 1)
        check_block(segment, rows, window, partial, full)


@given(st.lists(segments, min_size=1, max_size=5), windows)
def test_blocks_of_decodes_list_what_each_sees(several: list[Segment], window: int | None) -> None:
    decodes = [
        segment._replace(num_rows=1, pages=segment.pages + index * NUM_PAGES)
        for index, segment in enumerate(several)
    ]
    num_pages = NUM_PAGES * len(decodes)

    blocks = decode_blocks(decodes, window, page_size=SIZE, num_entries=6, device=CPU)

    positions = page_positions(decodes, page_size=SIZE, num_pages=num_pages, device=CPU)
    for entry, segment in enumerate(decodes):
        rows = range(segment.first_position, segment.first_position + 1)
        check_block(segment, rows, window, *listed(blocks, positions, entry, 0))
    assert blocks.num_partial[len(decodes) :].sum() == 0
    assert blocks.num_full[len(decodes) :].sum() == 0


def test_tables_of_a_chunk_take_memory_of_its_pages_not_of_pages_times_blocks() -> None:
    num_pages, num_rows = 65536, 4096
    pages = np.arange(num_pages, dtype=np.int64)
    keys = num_pages * 16
    segment = Segment(0, num_rows, keys - num_rows, keys, pages)

    blocks = chunk_blocks(segment, None, page_size=16, group=4, device=CPU)

    assert blocks.full.shape[2] == num_rows * 4 // masks.QUERY_BLOCK
    assert blocks.full.untyped_storage().nbytes() <= 4 * num_pages
    assert blocks.partial.untyped_storage().nbytes() <= 4 * num_pages


def test_a_long_decode_does_not_widen_the_tables_of_short_ones() -> None:
    lengths = [3, 5000, 1, 70, 4097]
    decodes = [Segment(0, 1, n * SIZE, n * SIZE, np.arange(n, dtype=np.int64)) for n in lengths]

    groups = [[len(s.pages) for s in group] for group in decode_groups(decodes)]

    assert groups == [[3, 1, 70], [5000, 4097]]


def test_many_decodes_are_split_into_calls_of_bounded_size() -> None:
    decode = Segment(0, 1, 3, 4, np.zeros(1, dtype=np.int64))

    groups = list(decode_groups([decode] * (2 * masks.MAX_BATCH + 1)))

    assert [len(group) for group in groups] == [masks.MAX_BATCH, masks.MAX_BATCH, 1]
