"""Attention by the C++ kernels: one call for all rows of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBatch
from mnemosyne.kernels.cpu.attention import SEGMENT_FIELDS, compile_attention, paged_attention
from mnemosyne.kernels.cpu.processor import InstructionSet

HEAD_DIMS = range(32, 257, 32)  # of which the kernel reads whole vectors


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The segments of a step, as the kernel reads them."""

    segments: Tensor  # int64 [B, 6]
    pages: Tensor  # int64, where segments find theirs
    page_size: int
    window: int | None
    is_covered: bool  # whether each row of the step is in a segment


class NativeBackend:
    """Flash attention in the dtypes of a set, page tables read in place, statistics in float32.

    Rows of all requests are computed in one call. The bits of a row do not depend on the chunk it
    came in, on its company, or on the number of threads. Temporaries: about a megabyte a thread,
    and one partial result per row and 8192 keys for up to 32 rows of a KV head. Slots that no row
    of a segment may see are never read.

    Args:
        instructions: a set that runs here; sets round differently.
        head_dim: D; its kernel is compiled on this machine's first use of it, in seconds.
        dtype: of q, k and v.
    """

    def __init__(self, instructions: InstructionSet, head_dim: int, dtype: torch.dtype) -> None:
        self.name = instructions.name
        self.can_record = True
        self._instructions = instructions
        compile_attention(
            head_dim, instructions, dtype
        )  # now, rather than in somebody's first step

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> _Table:
        """Lay the segments out as a table (see ``AttentionBackend``)."""
        if device.type != "cpu":
            raise ValueError(f"device must be cpu, got {device}; use attention=flex there")
        batch = batch.with_page_ids(device)
        assert batch.page_ids is not None
        segments = torch.from_numpy(_segment_table(batch))
        is_covered = sum(s.num_rows for s in batch.segments) == batch.num_rows
        return _Table(segments, batch.page_ids, batch.page_size, window, is_covered)

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
            instructions=self._instructions,
            is_covered=prepared.is_covered,
        )
        return out_THD, lse_TH if return_lse else None

    def fixed(
        self, k_KSD: Tensor, *, num_rows: int, page_size: int, page_ids: Tensor
    ) -> FixedNative:
        """See ``RecordableBackend``."""
        return FixedNative(self, num_rows=num_rows, page_size=page_size, page_ids=page_ids)


class FixedNative:
    """``NativeBackend`` for steps of a fixed number of one-row sequences.

    The kernel finds every step in the same tables: ``prepare`` copies the step there, and has
    whoever repeats the calls of ``attend`` compute it. Rows of no sequence see no key.

    Args:
        backend: calls the kernel.
        num_rows: T of every step, padding included.
        page_size: tokens per page.
        page_ids: the ``page_ids`` of every step.
    """

    def __init__(
        self, backend: NativeBackend, *, num_rows: int, page_size: int, page_ids: Tensor
    ) -> None:
        self.name = backend.name
        self.can_record = False
        self._backend = backend
        self._num_rows = num_rows
        self._page_size = page_size
        self._page_ids = page_ids
        self._tables: dict[int | None, _Table] = {}  # by window

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> _Table:
        """Enter a step in the tables of a window; made at the first call, the same ever after."""
        assert batch.num_rows == self._num_rows
        assert batch.page_size == self._page_size
        assert all(segment.num_rows == 1 for segment in batch.segments)
        if window not in self._tables:
            self._tables[window] = _Table(
                segments=torch.zeros((self._num_rows, SEGMENT_FIELDS), dtype=torch.int64),
                pages=self._page_ids,
                page_size=self._page_size,
                window=window,
                is_covered=True,
            )
        assert batch.page_ids is self._page_ids or not batch.segments
        table, used = self._tables[window], _segment_table(batch)
        segments = np.zeros((self._num_rows, SEGMENT_FIELDS), dtype=np.int64)
        segments[:, 0] = np.arange(self._num_rows)  # of no key, unless the step has some
        segments[:, 1] = 1
        segments[used[:, 0]] = used
        table.segments.copy_(torch.from_numpy(segments))
        return table

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
        assert len(q_THD) == self._num_rows
        return self._backend.attend(
            q_THD, k_KSD, v_KSD, prepared, scale=scale, return_lse=return_lse
        )


def _segment_table(batch: AttentionBatch) -> np.ndarray:
    """The segments of a step, int64 ``[B, 6]``."""
    rows = [
        (s.first_row, s.num_rows, s.first_position, s.num_keys, s.first_key, s.page_of_key_0)
        for s in batch.segments
    ]
    return np.array(rows, dtype=np.int64).reshape(len(rows), SEGMENT_FIELDS)


def why_not_native(instructions: InstructionSet, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels of a set cannot serve a model here, None if they can."""
    if (why_not := instructions.why_not_in(dtype)) is not None:
        return why_not
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims that are multiples of 32 up to 256, not {head_dim}"
    return instructions.why_not()
