"""Attention of single rows over a paged cache, their keys split over the chip."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from mnemosyne.kernels.merge_partials import merge_splits
from mnemosyne.kernels.tile import (
    TileConfig,
    Tiles,
    block_sizes,
    descriptors_of,
    launches_early,
    load_queries,
    partial_buffers,
    store_result,
    visit_keys,
)


@triton.jit
def decode_kernel(
    q,  # [T, H, D]
    k,  # [K, S, D]
    v,  # [K, S, D]
    k_descriptor,  # of [K, S, D], blocks of [1, BLOCK_N, D]; or None
    v_descriptor,
    out,  # [T, H, D]
    lse,  # [T, H]
    partial_out,  # [X, H, D]
    partial_lse,  # [X, H]
    items,  # int64 [I, 8]
    pages,  # int32
    num_kv_heads,
    stride_qt,
    stride_qh,
    stride_pool,  # elements per KV head
    stride_s,
    SCALE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One item and KV head: its row sees every key of the item."""
    if EARLY:  # the merge may take its place on the processors, and wait there
        gdc_launch_dependents()
    pid = tl.program_id(0)
    head = (pid % num_kv_heads).to(tl.int64)
    item = items + (pid // num_kv_heads).to(tl.int64) * 8
    first_row = tl.load(item)
    table = pages + tl.load(item + 3)
    key_lo = tl.load(item + 4).to(tl.int32)
    key_hi = tl.load(item + 5).to(tl.int32)
    queries = load_queries(
        q, first_row, 1, head, stride_qt, stride_qh, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    WIDE: tl.constexpr = lse.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=WIDE)
    total = tl.zeros([BLOCK_M], dtype=WIDE)
    top = total - float("inf")
    start = key_lo // BLOCK_N * BLOCK_N
    full_lo = (key_lo + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_hi = tl.maximum(full_lo, key_hi // BLOCK_N * BLOCK_N)
    for part in tl.static_range(3):
        lo = start if part == 0 else (full_lo if part == 1 else full_hi)
        hi = full_lo if part == 0 else (full_hi if part == 1 else key_hi)
        acc, total, top = visit_keys(
            acc,
            total,
            top,
            queries,
            k + head * stride_pool,
            v + head * stride_pool,
            k_descriptor,
            v_descriptor,
            head.to(tl.int32),
            table,
            stride_s,
            lo,
            hi,
            key_lo,
            key_hi,
            None,
            None,
            part != 1,
            False,
            k_descriptor is not None,
            SCALE,
            PAGE_SIZE,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
    store_result(
        acc,
        total,
        top,
        out,
        lse,
        partial_out,
        partial_lse,
        first_row,
        1,
        tl.load(item + 6),
        tl.load(item + 7),
        head,
        num_kv_heads * GROUP,
        GROUP,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_D,
    )


def paged_decode(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    tiles: Tiles,
    *,
    page_size: int,
    scale: float,
    config: TileConfig,
) -> None:
    """Attention of the rows that the tiles name over their pages, in place in out and LSE.

    Args:
        q_THD: packed queries, the last dim contiguous.
        k_KSD: keys of the whole pool, contiguous per head; any number of slots.
        v_KSD: values, strides of ``k_KSD``.
        out_THD: dtype of ``q_THD``, contiguous; only rows of the tiles are written.
        lse_TH: float32, or float64 for float64 queries; contiguous; natural log.
        tiles: tiles of one row.
        page_size: tokens per page.
        scale: factor on the scores.
        config: how to build the kernel; descriptors are used where a block lies in one page.
    """
    assert q_THD.stride(-1) == k_KSD.stride(-1) == 1
    assert k_KSD.stride() == v_KSD.stride()
    assert scale > 0, "the largest score is looked for before it is scaled"
    if not len(tiles.items):
        return
    num_kv_heads, _, head_dim = k_KSD.shape
    group = q_THD.shape[1] // num_kv_heads
    partials = partial_buffers(tiles, out_THD, lse_TH)
    decode_kernel[(len(tiles.items) * num_kv_heads,)](
        q_THD,
        k_KSD,
        v_KSD,
        *descriptors_of(k_KSD, v_KSD, config, page_size),
        out_THD,
        lse_TH,
        *partials,
        tiles.items,
        tiles.pages,
        num_kv_heads,
        q_THD.stride(0),
        q_THD.stride(1),
        k_KSD.stride(0),
        k_KSD.stride(1),
        SCALE=scale,
        PAGE_SIZE=page_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        **block_sizes(config, head_dim, group),
        EARLY=launches_early(q_THD.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    merge_splits(*partials, out_THD, lse_TH, tiles.merges)
