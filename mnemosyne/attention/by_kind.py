"""Decodes by one backend, chunks by another: each where it was measured to be the faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBackend, AttentionBatch, RecordableBackend

Part = tuple[AttentionBackend, Any]  # a backend, and what it prepared


class ByKind:
    """Two backends in one.

    Args:
        decode: computes segments of one row.
        chunk: computes the others.
    """

    def __init__(self, decode: AttentionBackend, chunk: AttentionBackend) -> None:
        self.name = f"{decode.name}+{chunk.name}"
        self.can_record = decode.can_record
        self.decode = decode
        self.chunk = chunk

    def prepare(
        self, batch: AttentionBatch, window: int | None, device: torch.device
    ) -> list[Part]:
        """Have each backend prepare what it computes (see ``AttentionBackend``)."""
        decodes = tuple(segment for segment in batch.segments if segment.num_rows == 1)
        chunks = tuple(segment for segment in batch.segments if segment.num_rows > 1)
        parts = [(self.chunk, chunks)] if chunks else []
        if decodes or not chunks:
            parts.append((self.decode, decodes))
        return [
            (backend, backend.prepare(replace(batch, segments=segments), window, device))
            for backend, segments in parts
        ]

    def fixed(
        self, k_KSD: Tensor, *, num_rows: int, page_size: int, page_ids: Tensor
    ) -> AttentionBackend:
        """That of the backend of decodes (see ``RecordableBackend``)."""
        decode = cast(RecordableBackend, self.decode)
        return decode.fixed(k_KSD, num_rows=num_rows, page_size=page_size, page_ids=page_ids)

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: list[Part],
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``)."""
        (out_THD, lse_TH), *others = (
            backend.attend(q_THD, k_KSD, v_KSD, tables, scale=scale, return_lse=return_lse)
            for backend, tables in prepared
        )
        for other_THD, other_TH in others:
            # Rows of one are padding of the other: (0, -inf) there.
            out_THD = out_THD + other_THD
            if lse_TH is not None and other_TH is not None:
                lse_TH = torch.maximum(lse_TH, other_TH)
        return out_THD, lse_TH
