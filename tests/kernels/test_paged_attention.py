"""Tiles, splits and merges of the paged attention kernels, where a backend would not split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from mnemosyne.attention import ReferenceBackend, Segment
from mnemosyne.attention import merge_partials as merge_in_torch
from mnemosyne.attention.tiles import cut_rows, split_keys
from mnemosyne.attention.triton import make_tiles
from mnemosyne.kernels.merge_partials import merge_splits
from mnemosyne.kernels.paged_chunk import paged_chunk
from mnemosyne.kernels.paged_decode import paged_decode
from mnemosyne.kernels.tile import TileConfig, Tiles, block_offsets, load_pages
from tests.attention.cases import Case, Rows, assert_exact, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = TileConfig(16, 16, 4, 2)
RAGGED = (Rows(1, 0), Rows(1, 199), Rows(1, 30, key_stop=0), Rows(1, 90, first_key=64), Rows(1, 17))
CHUNKS = (Rows(21, 150), Rows(5, 0), Rows(7, 3, key_stop=30, first_key=8), Rows(2, 60, key_stop=40))


def tiles_of(case: Case, tile_rows: int, window: int | None = None, min_keys: int = 16) -> Tiles:
    batch = case.batch.with_page_ids(case.q_THD.device)
    assert batch.page_ids is not None
    return make_tiles(
        list(batch.segments),
        batch.page_ids,
        window,
        tile_rows=tile_rows,
        num_shares=100,
        min_keys=min_keys,
        block=16,
        device=case.q_THD.device,
    )


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", [(2, 5, 16), (1, 1, 24)])
@pytest.mark.parametrize("rows", [RAGGED, CHUNKS], ids=["decode", "chunk"])
def test_keys_split_over_many_items_are_exact(
    rows: tuple[Rows, ...], heads: tuple[int, int, int], window: int | None
) -> None:
    case = make_case(rows, heads=heads).to(torch.float64, DEVICE)
    is_decode = rows is RAGGED
    tiles = tiles_of(case, 1 if is_decode else 16 // heads[1], window)
    out, lse = torch.zeros_like(case.q_THD), torch.full_like(case.q_THD[..., 0], -torch.inf)

    tensors = case.q_THD, case.k_KSD, case.v_KSD, out, lse, tiles
    if is_decode:
        paged_decode(*tensors, page_size=16, scale=case.scale, config=CONFIG)
    else:
        paged_chunk(*tensors, page_size=16, window=window, scale=case.scale, config=CONFIG)

    expected_out, expected_lse = case.attend(ReferenceBackend(), window, return_lse=True)
    assert len(tiles.merges) > 0
    assert_exact(out, expected_out)
    assert_exact(lse, expected_lse)


def test_descriptors_load_what_pointers_do() -> None:
    case = make_case([Rows(9, 150)], heads=(2, 2, 16)).to(torch.float32, DEVICE)
    tiles = tiles_of(case, 8, min_keys=1024)

    results = []
    for config in (CONFIG, replace(CONFIG, descriptor=True)):
        out, lse = torch.zeros_like(case.q_THD), torch.zeros_like(case.q_THD[..., 0])
        tensors = case.q_THD, case.k_KSD, case.v_KSD, out, lse, tiles
        paged_chunk(*tensors, page_size=16, window=None, scale=case.scale, config=config)
        results.append(out)

    assert results[0].abs().sum() > 0
    assert torch.equal(*results)


@triton.jit
def offsets_kernel(pages, stride_s, result, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    page = load_pages(pages, BLOCK_N, 2 * BLOCK_N, 0, 2 * BLOCK_N, PAGE_SIZE, BLOCK_N)
    common, at = block_offsets(page, BLOCK_N, stride_s, PAGE_SIZE, BLOCK_N)
    tl.store(result + tl.arange(0, BLOCK_N), common + at)


@pytest.mark.parametrize("page_size", [8, 16, 24, 32])
def test_offsets_pass_31_bits(page_size: int) -> None:
    pages = torch.tensor([2**30, 2**26 + 1, 3, 2**30 + 5], dtype=torch.int32, device=DEVICE)
    result = torch.zeros(16, dtype=torch.int64, device=DEVICE)

    offsets_kernel[(1,)](pages, 128, result, PAGE_SIZE=page_size, BLOCK_N=16)

    key = torch.arange(16, 32)
    slot = pages.cpu().long()[key // page_size] * page_size + key % page_size
    assert (slot * 128).max() > 2**31
    assert torch.equal(result.cpu(), slot * 128)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_partials_merge_as_in_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = torch.randn(4, 3, 2, 24, dtype=dtype, device=DEVICE)
    lse = 30 * torch.randn(4, 3, 2, dtype=dtype, device=DEVICE)
    lse[1:, 0], lse[:, 1, 0] = -torch.inf, -torch.inf  # one partial saw a key; none did
    out[lse.isneginf()] = 0

    merged, merged_lse = torch.empty_like(out[0]), torch.empty_like(lse[0])
    rows = torch.arange(3)
    merges = torch.stack((rows, rows, 0 * rows + 4, 0 * rows + 3), dim=1).to(DEVICE)
    merge_splits(out.flatten(0, 1), lse.flatten(0, 1), merged, merged_lse, merges)

    expected, expected_lse = merge_in_torch(out, lse)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(merged_lse, expected_lse)


def test_one_long_request_is_spread_and_short_ones_stay_whole() -> None:
    pages = np.zeros(1, dtype=np.int64)
    lengths = [10_000_000, *([1000] * 63)]
    segments = [Segment(row, 1, n - 1, n, pages) for row, n in enumerate(lengths)]

    items, merges, num_partials = split_keys(
        cut_rows(segments, 1, None), num_shares=32, min_keys=256, block=64
    )

    keys = items[:, 5] - items[:, 4]
    assert keys.sum() == sum(lengths)
    assert keys.max() <= 1.1 * sum(lengths) / 32
    assert (np.diff(keys) <= 0).all()  # the longest start first
    assert num_partials == merges[0, 2] == len(items) - 63
    assert (items[items[:, 7] == 1, 0] > 0).all()
