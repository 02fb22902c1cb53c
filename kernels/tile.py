"""The parts that both attention kernels share: load queries, visit keys block by block, store.

A tile holds all query heads of one KV head for some consecutive rows of one sequence: query m of
it is row ``m // GROUP`` and head ``m % GROUP``. Keys are counted within the local shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
DESCRIPTOR_HEAD_DIMS = (16, 32, 64, 128)  # whole heads in a block
SPECIALIZED_HEAD_DIMS = (64, 128)
# True where kernels of this process run in the interpreter; read when they are defined.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Work of one launch. A tile whose keys are split over several items leaves partials.

    Fields of an item: packed row of the tile's first query row; rows of the tile; the local key
    at the position of its first row (negative where the shard begins later); index into ``pages``
    of the sequence's first page; first local key and the one after the last; row of its partial;
    1 if it holds all keys of the tile, and writes the result itself.

    Fields of a merge: packed row; row of its first partial; number of partials; rows between them.
    """

    items: Tensor  # int64 [I, 8]
    whole_items: Tensor  # int64 [W, 8], of whole blocks that all rows see, for specialized warps
    merges: Tensor  # int64 [M, 4]
    pages: Tensor  # int32 or int64, the page ids of all sequences
    num_partials: int  # rows of partials
    most_parts: int  # items of one tile
    num_rows: int  # that are written; others of the step see no key here


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a kernel is built; which one is fastest depends on the GPU."""

    block_m: int  # queries of a tile; more where one row has more heads than that
    block_n: int  # keys per step of the loop
    num_warps: int
    num_stages: int
    descriptor: bool = False  # keys and values through tensor descriptors; Hopper and newer
    programs: int = 2  # per processor, over which one long sequence is split
    specialized: bool = False  # whole blocks by warps that fetch or compute; Hopper


@triton.jit
def load_queries(
    q,  # [T, H, D]
    first_row,
    num_rows,
    head,
    stride_qt,
    stride_qh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries of a tile, ``[BLOCK_M, BLOCK_D]``, 0 beyond its rows."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = first_row + m // GROUP
    at = row * stride_qt + (head * GROUP + m % GROUP) * stride_qh
    inside = (m < num_rows * GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(q + at[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def product(a, b, acc):
    """``acc + a @ b``, with all the digits that the dtype has."""
    if INTERPRETED:  # on NumPy, which has no bfloat16
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def load_pages(
    pages,  # int32, int64 on CPU, of the sequence
    first,  # local key, a multiple of BLOCK_N
    stop,
    key_lo,
    key_hi,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The pages of BLOCK_N keys: one, or one for each key; 0 where nothing may be read."""
    if PAGE_SIZE % BLOCK_N == 0:  # one page holds them all
        return tl.load(pages + first // PAGE_SIZE, mask=first < stop, other=0).to(tl.int32)
    else:
        key = first + tl.arange(0, BLOCK_N)
        is_read = (key >= key_lo) & (key < key_hi)
        return tl.load(pages + key // PAGE_SIZE, mask=is_read, other=0).to(tl.int32)


@triton.jit
def block_offsets(page, first, stride_s, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of BLOCK_N keys, ``(common, of each key)``; elements outnumber 31 bits early.

    The second one does not change from block to block where one page holds them all.
    """
    n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        return (page.to(tl.int64) * PAGE_SIZE + first % PAGE_SIZE) * stride_s, n * stride_s
    else:
        slot = page.to(tl.int64) * PAGE_SIZE + (first + n) % PAGE_SIZE
        return tl.full([], 0, tl.int64), slot * stride_s


@triton.jit
def load_block(
    pool,  # [S, D] of one head
    descriptor,
    head,
    common,
    at,  # [BLOCK_N]
    inside,  # [BLOCK_N]
    first_slot,
    MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys or values of a block, ``[BLOCK_N, BLOCK_D]``; with MASKED those inside alone."""
    d = tl.arange(0, BLOCK_D)
    where = pool + common + (at[:, None] + d[None, :])
    if DESCRIPTOR:
        return descriptor.load([head, first_slot, 0]).reshape(BLOCK_N, BLOCK_D)
    elif MASKED and HEAD_DIM == BLOCK_D:
        return tl.load(where, mask=inside[:, None], other=0.0)
    elif MASKED:
        return tl.load(where, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        return tl.load(where)
    else:
        return tl.load(where, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def visit_keys(
    acc,  # [BLOCK_M, BLOCK_D]
    total,  # [BLOCK_M], sum of exponents
    top,  # [BLOCK_M], largest score so far, base 2
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [S, D] of one head
    v,  # [S, D] of one head
    k_descriptor,
    v_descriptor,
    head,
    pages,  # int32, of the sequence
    stride_s,
    start,
    stop,
    key_lo,
    key_hi,
    last_key,  # [BLOCK_M], the last one each query sees
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SCALE: tl.constexpr,  # positive
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold the keys from ``start`` to ``stop`` into the running softmax.

    ``start`` is a multiple of BLOCK_N. Without MASKED all queries see all these keys; with it,
    those from ``key_lo`` to ``key_hi`` and, under DIAGONAL, in their own window; others are not
    even read.
    """
    THROUGH_DESCRIPTOR: tl.constexpr = DESCRIPTOR and not MASKED
    # A page is looked up one block ahead: looked up in time for its own, the compiler would halve
    # the distance at which keys and values are fetched.
    page = load_pages(pages, start, stop, key_lo, key_hi, PAGE_SIZE, BLOCK_N)
    for first in range(start, stop, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        inside = (key >= key_lo) & (key < key_hi)
        common, at = block_offsets(page, first, stride_s, PAGE_SIZE, BLOCK_N)
        if THROUGH_DESCRIPTOR:
            first_slot = page * PAGE_SIZE + first % PAGE_SIZE
        else:
            first_slot = 0
        page = load_pages(pages, first + BLOCK_N, stop, key_lo, key_hi, PAGE_SIZE, BLOCK_N)
        k_ND = load_block(
            k,
            k_descriptor,
            head,
            common,
            at,
            inside,
            first_slot,
            MASKED,
            THROUGH_DESCRIPTOR,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
        score = product(q, k_ND.T, tl.zeros([q.shape[0], BLOCK_N], dtype=acc.dtype))
        if MASKED:
            seen = inside[None, :]
            if DIAGONAL:
                seen = seen & (key[None, :] <= last_key[:, None])
                if WINDOW is not None:
                    seen = seen & (key[None, :] > last_key[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * (SCALE * LOG2_E))
        # (-inf) - (-inf) is nan: a query that saw no key yet is shifted by 0.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        weight = tl.exp2(score * (SCALE * LOG2_E) - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        v_ND = load_block(
            v,
            v_descriptor,
            head,
            common,
            at,
            inside,
            first_slot,
            MASKED,
            THROUGH_DESCRIPTOR,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
        acc = product(weight.to(v_ND.dtype), v_ND, acc)
        top = new_top
    return acc, total, top


@triton.jit
def store_result(
    acc,
    total,
    top,
    out,  # [T, H, D]
    lse,  # [T, H]
    partial_out,  # [X, H, D]
    partial_lse,  # [X, H]
    first_row,
    num_rows,
    partial,
    is_whole,
    head,
    num_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalise a tile and write it, as the result or as a partial; (0, -inf) for an empty row."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_query = m < num_rows * GROUP
    inside = is_query[:, None] & (d < HEAD_DIM)[None, :]
    # An empty row has total 0 and top -inf: the result is 0, the sum below -inf.
    safe = tl.where(total == 0.0, 1.0, total)
    result = acc / safe[:, None]
    result_lse = (top + tl.log2(safe)) / LOG2_E
    if is_whole == 1:
        at = (first_row + m // GROUP) * num_heads + head * GROUP + m % GROUP
        where = at[:, None] * HEAD_DIM + d[None, :]
        tl.store(out + where, result.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + at, result_lse, mask=is_query)
    else:
        at = (partial + m // GROUP) * num_heads + head * GROUP + m % GROUP
        where = at[:, None] * HEAD_DIM + d[None, :]
        tl.store(partial_out + where, result, mask=inside)
        tl.store(partial_lse + at, result_lse, mask=is_query)


@cache  # asked at every launch
def launches_early(device: torch.device) -> bool:
    """Return whether a kernel may be launched while the one before still runs; Hopper and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def descriptors_of(
    k_KSD: Tensor, v_KSD: Tensor, config: TileConfig, page_size: int
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """For blocks of keys and of values, where they are wanted and a block lies in one page."""
    head_dim = k_KSD.shape[-1]
    if not config.descriptor or page_size % config.block_n or head_dim not in DESCRIPTOR_HEAD_DIMS:
        return None, None
    shape = [1, config.block_n, head_dim]
    return TensorDescriptor.from_tensor(k_KSD, shape), TensorDescriptor.from_tensor(v_KSD, shape)


def partial_buffers(tiles: Tiles, out_THD: Tensor, lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the partials of a launch, in the dtype of the LSE."""
    rows = max(1, tiles.num_partials)
    return (
        torch.empty((rows, *out_THD.shape[1:]), dtype=lse_TH.dtype, device=out_THD.device),
        torch.empty((rows, *lse_TH.shape[1:]), dtype=lse_TH.dtype, device=out_THD.device),
    )


def block_sizes(config: TileConfig, head_dim: int, group: int) -> dict[str, int]:
    """Tile sizes that fit a row's heads and the tensor cores, which take no less than 16."""
    return {
        "BLOCK_M": max(config.block_m, 16, triton.next_power_of_2(group)),
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
