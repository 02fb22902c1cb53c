"""Paged attention by C++ kernels; the torch original is ``mnemosyne.attention.cpu``."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mnemosyne.kernels.cpu.processor import InstructionSet
from mnemosyne.kernels.cpu.tape import launch

_NUMBERS = (
    *("q", "q_stride", "k", "v", "pool_stride", "out", "lse", "num_heads", "num_kv_heads"),
    *("segments", "num_segments", "pages", "page_size", "window"),
)


class _Call(ctypes.Structure):
    """The argument of the kernel."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_double),
        ("num_threads", ctypes.c_int64),
    )


SEGMENT_FIELDS = 6  # first_row, num_rows, first_position, num_keys, first_key, first_page


def paged_attention(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    segments: Tensor,
    pages: Tensor,
    *,
    page_size: int,
    window: int | None,
    scale: float,
    instructions: InstructionSet,
    is_covered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of packed rows over the pages of their sequences, all in one call.

    The bits of a row depend on its query, its keys and where they are cut into shards; not on the
    chunk it came in, its company, or the number of threads.

    Args:
        q_THD: a dtype of the set; each row contiguous.
        k_KSD: keys of the whole pool, in the same dtype; each head contiguous.
        v_KSD: values, likewise.
        segments: int64 [B, 6], contiguous: first_row, num_rows, first_position, num_keys,
            first_key, and where in ``pages`` the segment's page ids begin.
        pages: int64, page ids of all segments.
        page_size: slots per page.
        window: keys a row sees, itself included; None: all before it.
        scale: factor on the scores, above 0.
        instructions: those that compute; sets round differently.
        is_covered: whether every row is in a segment.

    Returns:
        ``out_THD`` in the same dtype and ``lse_TH`` float32, natural log; (0, -inf) for a row that
        saw no key and for rows of no segment.

    Source: online softmax over tiles, FlashAttention-2, arXiv:2307.08691.
    """
    num_rows, num_heads, head_dim = q_THD.shape
    assert q_THD.dtype == k_KSD.dtype == v_KSD.dtype
    assert q_THD.stride()[1:] == (head_dim, 1)
    assert k_KSD.stride() == v_KSD.stride()
    assert k_KSD.stride()[1:] == (head_dim, 1)
    assert scale > 0
    if is_covered:
        out_THD = q_THD.new_empty(q_THD.shape)
        lse_TH = q_THD.new_empty((num_rows, num_heads), dtype=torch.float32)
    else:
        out_THD = q_THD.new_zeros(q_THD.shape)
        lse_TH = torch.full((num_rows, num_heads), -torch.inf)
    arguments = _Call(
        q_THD.data_ptr(),
        q_THD.stride(0),
        k_KSD.data_ptr(),
        v_KSD.data_ptr(),
        k_KSD.stride(0),
        out_THD.data_ptr(),
        lse_TH.data_ptr(),
        num_heads,
        k_KSD.shape[0],
        segments.data_ptr(),
        len(segments),
        pages.data_ptr(),
        page_size,
        window or 0,
        scale,
        torch.get_num_threads(),
    )
    launch(compile_attention(head_dim, instructions, q_THD.dtype), arguments)
    return out_THD, lse_TH


@cache
def compile_attention(head_dim: int, instructions: InstructionSet, dtype: torch.dtype) -> Any:
    """The C function for one head dim, a multiple of 32; compiled if it never was.

    Args:
        head_dim: D.
        instructions: a set that runs here.
        dtype: one of its dtypes.
    """
    assert head_dim % 32 == 0
    operator = instructions.load(instructions.attention, dtype, HEAD_DIM=head_dim).paged_attention
    operator.argtypes, operator.restype = [ctypes.c_void_p], None
    return operator
