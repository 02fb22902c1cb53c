"""The log-sum-exp merge of any number of partials per row; ``merge_partials`` in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from mnemosyne.kernels.tile import launches_early

MOST_PARTIALS = 32  # read at a time


@triton.jit
def merge_kernel(
    partial_out,  # [X, H, D]
    partial_lse,  # [X, H]
    out,  # [T, H, D]
    lse,  # [T, H]
    merges,  # int64 [M, 4]: row, first partial, number, distance
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row and head: weights e^(lse - top), BLOCK_P partials read at a time.

    With EARLY it may be launched before the kernel that writes the partials has ended.
    """
    if EARLY:
        gdc_wait()
    pid = tl.program_id(0).to(tl.int64)
    head = pid % num_heads
    fields = merges + pid // num_heads * 4
    row = tl.load(fields)
    partial = tl.load(fields + 1)
    count = tl.load(fields + 2).to(tl.int32)
    distance = tl.load(fields + 3)
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    acc = tl.zeros([BLOCK_D], dtype=partial_lse.dtype.element_ty)
    total = tl.full([], 0.0, dtype=acc.dtype)
    top = tl.full([], float("-inf"), dtype=acc.dtype)
    for first in range(0, count, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P)
        is_part = index < count
        at = (partial + index * distance) * num_heads + head
        part_lse = tl.load(partial_lse + at, mask=is_part, other=float("-inf"))
        where = at[:, None] * HEAD_DIM + d[None, :]
        part = tl.load(partial_out + where, mask=is_part[:, None] & inside[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp(top - shift), tl.exp(part_lse - shift)
        acc = acc * decay + tl.sum(part.to(acc.dtype) * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top
    safe = tl.where(total == 0.0, 1.0, total)
    at = row * num_heads + head
    tl.store(out + at * HEAD_DIM + d, (acc / safe).to(out.dtype.element_ty), mask=inside)
    # top is -inf where no partial saw a key, and so is the sum
    tl.store(lse + at, top + tl.log(safe))


def merge_splits(
    partial_out_XHD: Tensor,
    partial_lse_XH: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    merges: Tensor,
    *,
    block: int = MOST_PARTIALS,
) -> None:
    """Merge a number of partials of its own for each of some rows, in place.

    Args:
        partial_out_XHD: partial outputs, float32 or float64, contiguous.
        partial_lse_XH: their natural-log LSE in the same dtype, contiguous.
        out_THD: the rows that ``merges`` names are overwritten; contiguous.
        lse_TH: likewise.
        merges: int64 [M, 4], see ``Tiles``.
        block: partials read at a time, a power of 2; another number may round otherwise.
    """
    _check(partial_out_XHD, partial_lse_XH)
    assert out_THD.is_contiguous()
    assert lse_TH.is_contiguous()
    num_heads, head_dim = out_THD.shape[1:]
    early = launches_early(out_THD.device)
    if len(merges):
        merge_kernel[(len(merges) * num_heads,)](
            partial_out_XHD,
            partial_lse_XH,
            out_THD,
            lse_TH,
            merges,
            num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_P=block,
            EARLY=early,
            **({"launch_pdl": True} if early else {}),
        )


def _check(out: Tensor, lse: Tensor) -> None:
    if lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse must be float32 or float64, got {lse.dtype}; cast it first")
    if out.shape[:-1] != lse.shape:
        raise ValueError(
            f"lse must have the shape of out without its last dim, {tuple(out.shape[:-1])}, "
            f"got {tuple(lse.shape)}; stack both over the same partials"
        )
    assert out.is_contiguous()
    assert lse.is_contiguous()
