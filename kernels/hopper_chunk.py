"""Attention of long chunks on Hopper: one warp fetches, two groups of four compute.

A chunk's rows all see most of their keys. This kernel takes the blocks that every row of a tile
sees whole, and ``paged_chunk`` the rest; the two merge by log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mnemosyne.kernels.tile import TileConfig, Tiles

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Triton 3.9 has it under a name of its own.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
# Warps of the first half, and registers of a thread before warps that compute take those of the
# one that fetches.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
BUFFERS = 2  # of keys and of values; a third made it slower on an H200
HALF_M: gl.constexpr = gl.constexpr(64)  # queries of one group of four warps


@gluon.jit
def fetch_blocks(
    fetching,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Keep the buffers of keys and values full; one warp."""
    descriptors, buffers, barriers, pages, first_slot, start, num_blocks = fetching
    k_descriptor, v_descriptor = descriptors
    _, k_blocks, v_blocks = buffers
    k_ready, k_free, v_ready, v_free = barriers
    for index in range(num_blocks):
        stage = index % STAGES
        free = index // STAGES & 1 ^ 1
        key = start + index * BLOCK_N
        slot = first_slot + gl.load(pages + key // PAGE_SIZE) * PAGE_SIZE + key % PAGE_SIZE
        mbarrier.wait(k_free.index(stage), free)
        mbarrier.expect(k_ready.index(stage), k_descriptor.block_type.nbytes)
        fetch(k_descriptor, [slot, 0], k_ready.index(stage), k_blocks.index(stage))
        mbarrier.wait(v_free.index(stage), free)
        mbarrier.expect(v_ready.index(stage), v_descriptor.block_type.nbytes)
        fetch(v_descriptor, [slot, 0], v_ready.index(stage), v_blocks.index(stage))


@gluon.jit
def store_queries(
    q_block,  # [HALF_M, HEAD_DIM]
    q,
    item,
    head,
    strides,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """The queries of a half to shared memory, 0 beyond the rows of the tile; four warps."""
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    stride_qt, stride_qh = strides
    first_row = gl.load(item)
    num_rows = gl.load(item + 1).to(gl.int32)
    m = HALF * HALF_M + gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    at = (first_row + m // GROUP) * stride_qt + (head * GROUP + m % GROUP) * stride_qh
    is_query = m < num_rows * GROUP
    queries = gl.load(q + at[:, None] + d[None, :], mask=is_query[:, None], other=0.0)
    q_block.store(queries)
    fence_async_shared()


@gluon.jit
def store_half(
    acc,  # [HALF_M, HEAD_DIM]
    total,  # [HALF_M]
    top,  # [HALF_M], base 2
    results,
    item,
    head,
    num_kv_heads,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """Normalise a half and write it, as the result or as a partial; every row saw a key."""
    out, lse, partial_out, partial_lse = results
    first_row = gl.load(item)
    num_rows = gl.load(item + 1).to(gl.int32)
    m = HALF * HALF_M + gl.arange(0, HALF_M, total.type.layout)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, acc.type.layout))
    is_query = m < num_rows * GROUP
    result = acc / total[:, None]
    result_lse = (top + gl.log2(total)) / LOG2_E
    is_whole = gl.load(item + 7) == 1
    row = gl.where(is_whole, first_row, gl.load(item + 6)) + m // GROUP
    at = row * (num_kv_heads * GROUP) + head * GROUP + m % GROUP
    where = at[:, None] * HEAD_DIM + d[None, :]
    if is_whole:
        gl.store(out + where, result.to(DTYPE), mask=is_query[:, None])
        gl.store(lse + at, result_lse, mask=is_query)
    else:
        gl.store(partial_out + where, result, mask=is_query[:, None])
        gl.store(partial_lse + at, result_lse, mask=is_query)


@gluon.jit
def attend_half(
    work,
    HALF: gl.constexpr,
    SCALE: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The queries of one half of a tile; four warps.

    Tensor cores compute the scores of a block and add up the values of the one before while the
    exponents are taken, by these warps and by those of the other half.
    """
    buffers, barriers, q, results, item, head, num_kv_heads, strides, num_blocks = work
    q_blocks, k_blocks, v_blocks = buffers
    k_ready, k_free, v_ready, v_free = barriers
    DTYPE: gl.constexpr = q_blocks.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    FACTOR: gl.constexpr = SCALE * LOG2_E
    q_block = q_blocks.index(HALF)
    store_queries(q_block, q, item, head, strides, HALF, GROUP, HEAD_DIM)

    no_scores = gl.zeros([HALF_M, BLOCK_N], gl.float32, score_layout)
    acc = gl.zeros([HALF_M, HEAD_DIM], gl.float32, acc_layout)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(
        q_block, k_blocks.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(0), count=1)
    top = gl.max(scores, 1) * FACTOR
    exponents = gl.exp2(scores * FACTOR - top[:, None])
    total = gl.sum(exponents, 1)
    weights = gl.convert_layout(exponents.to(DTYPE), weight_layout)
    mbarrier.wait(k_ready.index(1 % STAGES), 1 // STAGES & 1, pred=num_blocks > 1)
    for index in range(1, num_blocks):
        stage = index % STAGES
        before = (index - 1) % STAGES
        scores = warpgroup_mma(
            q_block, k_blocks.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(before), (index - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_blocks.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_free.index(stage), count=1)
        new_top = gl.maximum(top, gl.max(scores, 1) * FACTOR)
        exponents = gl.exp2(scores * FACTOR - new_top[:, None])
        decay = gl.exp2(top - new_top)
        total = total * decay + gl.sum(exponents, 1)
        top = new_top
        # The wait for the next keys also keeps the assembler from putting off the exponents until
        # the values are added up.
        after = index + 1
        mbarrier.wait(k_ready.index(after % STAGES), after // STAGES & 1, pred=after < num_blocks)
        acc, exponents, total = warpgroup_mma_wait(0, deps=(acc, exponents, total))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(decay, out_row_layout)[:, None]
        weights = gl.convert_layout(exponents.to(DTYPE), weight_layout)
    last = num_blocks - 1
    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(weights, v_blocks.index(last % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    total = gl.convert_layout(total, out_row_layout)
    top = gl.convert_layout(top, out_row_layout)
    store_half(acc, total, top, results, item, head, num_kv_heads, HALF, GROUP, HEAD_DIM, DTYPE)


@gluon.jit
def hopper_chunk_kernel(
    q,  # [T, H, D]
    k_descriptor,  # of [K * S, D], blocks of [BLOCK_N, D]
    v_descriptor,
    out,  # [T, H, D]
    lse,  # [T, H]
    partial_out,  # [X, H, D]
    partial_lse,  # [X, H]
    items,  # int64 [I, 8]
    pages,  # int32
    num_kv_heads,
    num_slots,  # S
    stride_qt,
    stride_qh,
    SCALE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One item and KV head; its rows see all of its keys, which are whole blocks."""
    pid = gl.program_id(0)
    head = (pid % num_kv_heads).to(gl.int64)
    item = items + (pid // num_kv_heads).to(gl.int64) * 8
    table = pages + gl.load(item + 3)
    start = gl.load(item + 4).to(gl.int32)
    num_blocks = (gl.load(item + 5).to(gl.int32) - start) // BLOCK_N
    first_slot = pid % num_kv_heads * num_slots

    layout: gl.constexpr = k_descriptor.layout
    q_blocks = gl.allocate_shared_memory(k_descriptor.dtype, [2, HALF_M, HEAD_DIM], layout)
    k_blocks = gl.allocate_shared_memory(k_descriptor.dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    v_blocks = gl.allocate_shared_memory(k_descriptor.dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()

    buffers = (q_blocks, k_blocks, v_blocks)
    barriers = (k_ready, k_free, v_ready, v_free)
    results = (out, lse, partial_out, partial_lse)
    strides = (stride_qt, stride_qh)
    descriptors = (k_descriptor, v_descriptor)
    work = (buffers, barriers, q, results, item, head, num_kv_heads, strides, num_blocks)
    fetching = (descriptors, buffers, barriers, table, first_slot, start, num_blocks)
    gl.warp_specialize(
        [
            (attend_half, (work, 0, SCALE, GROUP, HEAD_DIM, BLOCK_N, STAGES)),
            (attend_half, (work, 1, SCALE, GROUP, HEAD_DIM, BLOCK_N, STAGES)),
            (fetch_blocks, (fetching, PAGE_SIZE, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )


def attend_whole_blocks(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    partial_out_XHD: Tensor,
    partial_lse_XH: Tensor,
    tiles: Tiles,
    *,
    page_size: int,
    scale: float,
    config: TileConfig,
) -> None:
    """Attention of the items of whole blocks, in place; arguments as for ``paged_chunk``."""
    num_kv_heads, num_slots, head_dim = k_KSD.shape
    assert num_kv_heads * num_slots < 2**31, "rows of a descriptor are counted in int32"
    assert q_THD.shape[1] // num_kv_heads <= config.block_m
    block = [config.block_n, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[k_KSD.dtype])
    descriptors = [
        TensorDescriptor.from_tensor(pool.view(-1, head_dim), block, layout)
        for pool in (k_KSD, v_KSD)
    ]
    hopper_chunk_kernel[(len(tiles.whole_items) * num_kv_heads,)](
        q_THD,
        *descriptors,
        out_THD,
        lse_TH,
        partial_out_XHD,
        partial_lse_XH,
        tiles.whole_items,
        tiles.pages,
        num_kv_heads,
        num_slots,
        q_THD.stride(0),
        q_THD.stride(1),
        SCALE=scale,
        PAGE_SIZE=page_size,
        GROUP=q_THD.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_N=config.block_n,
        STAGES=BUFFERS,
        **LAUNCH,
    )
