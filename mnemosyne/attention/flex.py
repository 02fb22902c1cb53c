"""Attention by FlexAttention, on CUDA and CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from mnemosyne.attention.flex_compiled import CompiledFlex, PagedTables
from mnemosyne.attention.flex_eager import DenseCall, EagerFlex, dense_calls
from mnemosyne.attention.segments import AttentionBatch

FLEX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Prepared:
    """Tables of a step for either mode, made when first needed."""

    def __init__(self, batch: AttentionBatch, window: int | None, device: torch.device) -> None:
        # Rows of a segment without keys stay (0, -inf).
        self._segments = [segment for segment in batch.segments if segment.num_keys]
        self._window = window
        self._page_size = batch.page_size
        self._device = device

    @cached_property
    def paged(self) -> PagedTables:
        return PagedTables(self._segments, self._window, self._page_size, self._device)

    @cached_property
    def dense(self) -> list[DenseCall]:
        return dense_calls(self._segments, self._window, self._page_size, self._device)


class FlexBackend:
    """FlexAttention over a paged cache, in one of two modes.

    The mode follows from dtype, device and whether the LSE is asked for, never from a failure:

    ===============================  ========  ==========================================
    dtype                            CUDA      CPU
    ===============================  ========  ==========================================
    float32, bfloat16, float16       compiled  compiled; eager where the LSE is asked for
    float64                          eager     eager
    ===============================  ========  ==========================================

    *Compiled* reads K and V in place, with a page as key block: ``page_size`` must be a power of
    two, 16 at least. The first call of a kind (decodes; chunks; chunks under a window) takes
    seconds, since it compiles. A page of which a row sees only a part is read whole and the rest
    weighted with 0, so **all slots of a page in use must hold finite numbers**, as a pool that
    starts as zeros does; other pages may hold anything. On a CPU with AMX, torch's kernel repacks
    the whole pool for each chunk: the ``cpu`` backend does not.

    *Eager* gathers the keys of one segment at a time and materialises at most 2**24 scores, or
    those of one row. Any page size will do, and slots that no row sees may hold anything.
    """

    name = "flex"
    can_record = False

    def __init__(self) -> None:
        self._compiled = CompiledFlex()
        self._eager = EagerFlex()

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> _Prepared:
        """Keep the segments; tables follow when a layer needs them (see ``AttentionBackend``)."""
        return _Prepared(batch.of_kept_keys(), window, device)

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: _Prepared,
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``)."""
        if q_THD.dtype not in FLEX_DTYPES:
            raise ValueError(
                f"q_THD must have a dtype of {FLEX_DTYPES}, got {q_THD.dtype}; cast it"
            )
        wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        heads = (k_KSD.shape[0], -1)
        out_THD = torch.zeros_like(q_THD)
        lse_TH = torch.full(q_THD.shape[:2], -torch.inf, dtype=wide, device=q_THD.device)
        out_TKGD, lse_TKG = out_THD.unflatten(1, heads), lse_TH.unflatten(1, heads)
        q_TKGD = q_THD.unflatten(1, heads)
        partials: Iterator[tuple[Tensor | slice, Tensor, Tensor | None]]
        if wide == torch.float32 and (q_THD.is_cuda or not return_lse):
            partials = self._compiled.partials(
                q_TKGD, k_KSD, v_KSD, prepared.paged, scale=scale, return_lse=return_lse
            )
        else:
            partials = self._eager.partials(q_TKGD, k_KSD, v_KSD, prepared.dense, scale=scale)
        for rows, out, lse in partials:
            out_TKGD[rows] = out
            if lse is not None:
                lse_TKG[rows] = lse
        return out_THD, lse_TH if return_lse else None
