"""Rotary positions fused with the write to the cache: q, k and v are read once, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 8  # heads of a program: a lone decode row of 48 heads still makes 6 programs


@triton.jit
def element_offsets(
    at,  # int64: the row of a packed tensor or the slot of a pool
    head,  # [BLOCK_H]
    stride_at,
    stride_head,
):
    """Offset of the first element of each head, int64: a pool passes 2^31 elements early."""
    return at * stride_at + head.to(tl.int64) * stride_head


@triton.jit
def rotate_tile(
    source,  # [., heads, D]
    target,  # likewise
    source_at,  # int64 [BLOCK_H], first element of each head
    target_at,  # int64 [BLOCK_H]
    cos,  # [BLOCK_D], this row's
    sin,  # [BLOCK_D]
    is_head,  # [BLOCK_H]
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn each pair (i, i + HALF) of some heads of one row; rounds once."""
    d = tl.arange(0, BLOCK_D)
    inside = is_head[:, None] & (d < HALF)[None, :]
    read = source + source_at[:, None] + d[None, :]
    first = tl.load(read, mask=inside, other=0.0).to(cos.dtype)
    second = tl.load(read + HALF, mask=inside, other=0.0).to(cos.dtype)
    write = target + target_at[:, None] + d[None, :]
    turned = first * cos[None, :] - second * sin[None, :]
    tl.store(write, turned.to(target.dtype.element_ty), mask=inside)
    turned = second * cos[None, :] + first * sin[None, :]
    tl.store(write + HALF, turned.to(target.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_write_kernel(
    q,  # [T, H, D]
    k,  # [T, K, D]
    v,  # [T, K, D]
    out,  # [T, H, D], contiguous
    k_pool,  # [K, S, D]
    v_pool,  # [K, S, D]
    cos,  # [T, D/2]
    sin,  # [T, D/2]
    slots,  # int64 [T]
    num_heads,
    num_kv_heads,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_pool,  # elements per KV head
    stride_s,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads of one row: of q, then of k, then of v."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(num_heads, BLOCK_H)
    kv_parts = tl.cdiv(num_kv_heads, BLOCK_H)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    angle = row * HALF + d
    row_cos = tl.load(cos + angle, mask=d < HALF, other=0.0)
    row_sin = tl.load(sin + angle, mask=d < HALF, other=0.0)
    if part < q_parts:
        head = part * BLOCK_H + h
        source_at = element_offsets(row, head, stride_qt, stride_qh)
        target_at = element_offsets(row, head, num_heads * HALF * 2, HALF * 2)
        is_head = head < num_heads
        rotate_tile(q, out, source_at, target_at, row_cos, row_sin, is_head, HALF, BLOCK_D)
    else:
        head = (part - q_parts) % kv_parts * BLOCK_H + h
        is_head = head < num_kv_heads
        target_at = element_offsets(tl.load(slots + row), head, stride_s, stride_pool)
        if part < q_parts + kv_parts:
            source_at = element_offsets(row, head, stride_kt, stride_kh)
            rotate_tile(k, k_pool, source_at, target_at, row_cos, row_sin, is_head, HALF, BLOCK_D)
        else:
            inside = is_head[:, None] & (d < HALF)[None, :]
            read = v + element_offsets(row, head, stride_vt, stride_vh)[:, None] + d[None, :]
            write = v_pool + target_at[:, None] + d[None, :]
            tl.store(write, tl.load(read, mask=inside), mask=inside)
            tl.store(write + HALF, tl.load(read + HALF, mask=inside), mask=inside)


def rotate_and_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    slots_T: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
) -> Tensor:
    """Rotate a step's queries and keys, and store its keys and values to their slots.

    Twin of ``rotate`` of the model's q and k, then ``PagePool.write``. The angles are formed in
    float64 once per step, for all layers: what arrives is their cos and sin.

    Args:
        q_THD: queries not rotated yet, the last dim contiguous.
        k_TKD: keys, likewise, in the dtype of ``q_THD``.
        v_TKD: values, likewise.
        cos_TD: [T, D/2], float32 or float64, contiguous; products take its dtype.
        sin_TD: likewise.
        slots_T: int64 slot of each row. Rows of one slot (padding) leave one of theirs there.
        k_KSD: keys of the whole pool, in the dtype of ``k_TKD``; overwritten at the slots.
        v_KSD: values, strides of ``k_KSD``; likewise.

    Returns:
        The rotated ``q_THD``, contiguous.
    """
    num_rows, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    assert head_dim % 2 == 0
    assert cos_TD.shape == sin_TD.shape == (num_rows, head_dim // 2)
    assert cos_TD.is_contiguous()
    assert sin_TD.is_contiguous()
    assert slots_T.dtype == torch.int64
    assert slots_T.is_contiguous()
    assert k_KSD.stride() == v_KSD.stride()
    assert all(x.stride(-1) == 1 for x in (q_THD, k_TKD, v_TKD, k_KSD))
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if not num_rows:
        return out_THD
    parts = triton.cdiv(num_heads, BLOCK_H) + 2 * triton.cdiv(num_kv_heads, BLOCK_H)
    rotate_and_write_kernel[(num_rows, parts)](
        *(q_THD, k_TKD, v_TKD, out_THD, k_KSD, v_KSD, cos_TD, sin_TD, slots_T),
        num_heads,
        num_kv_heads,
        *(stride for x in (q_THD, k_TKD, v_TKD) for stride in x.stride()[:2]),
        *k_KSD.stride()[:2],
        HALF=head_dim // 2,
        BLOCK_H=BLOCK_H,
        BLOCK_D=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return out_THD
