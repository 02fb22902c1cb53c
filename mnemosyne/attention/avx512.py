"""Attention on CPUs with AVX-512 BF16: one call of a C++ kernel for all rows of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBatch
from mnemosyne.cache.layout import pages_for
from mnemosyne.kernels.cpu.attention import SEGMENT_FIELDS, compile_attention, paged_attention
from mnemosyne.kernels.cpu.library import what_is_missing

HEAD_DIMS = range(32, 257, 32)  # of which the kernel reads whole vectors


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The segments of a step, as the kernel reads them."""

    segments: Tensor  # int64 [B, 6]
    pages: Tensor  # int64, of all segments
    page_size: int
    window: int | None


class Avx512Backend:
    """Flash attention in bfloat16, page tables read in place, statistics in float32.

    Rows of all requests are computed in one call. The bits of a row do not depend on the chunk it
    came in, on its company, or on the number of threads. Temporaries: about a megabyte a thread,
    and one partial result per row and 8192 keys for up to 32 rows of a KV head. Slots that no row
    of a segment may see are never read.

    Args:
        head_dim: D; its kernel is compiled on this machine's first use of it, in seconds.
    """

    name = "avx512"

    def __init__(self, head_dim: int) -> None:
        compile_attention(head_dim)  # now, rather than in somebody's first step

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> _Table:
        """Lay the segments out as a table (see ``AttentionBackend``)."""
        if device.type != "cpu":
            raise ValueError(f"device must be cpu, got {device}; use attention=flex there")
        rows, pages, first_page = [], [np.empty(0, np.int64)], 0
        for s in batch.segments:
            rows.append(
                (s.first_row, s.num_rows, s.first_position, s.num_keys, s.first_key, first_page)
            )
            pages.append(s.pages[: pages_for(s.num_keys, batch.page_size)])
            first_page += len(pages[-1])
        segments = np.array(rows, dtype=np.int64).reshape(len(rows), SEGMENT_FIELDS)
        table = torch.from_numpy(segments), torch.from_numpy(np.concatenate(pages))
        return _Table(*table, batch.page_size, window)

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: _Table,
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``)."""
        out_THD, lse_TH = paged_attention(
            q_THD.contiguous(),
            k_KSD,
            v_KSD,
            prepared.segments,
            prepared.pages,
            page_size=prepared.page_size,
            window=prepared.window,
            scale=scale,
        )
        return out_THD, lse_TH if return_lse else None


def why_not_avx512(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot serve a model here, None if it can."""
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims that are multiples of 32 up to 256, not {head_dim}"
    return what_is_missing()
