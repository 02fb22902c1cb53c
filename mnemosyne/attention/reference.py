"""Dense attention straight from the contract: the oracle of every other backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBatch
from mnemosyne.cache.layout import slots_of


@dataclass(frozen=True, slots=True, eq=False)
class _DenseSegment:
    first_row: int
    num_rows: int
    slots: Tensor  # int64 [num_keys]
    visible: Tensor  # bool [num_rows, num_keys]


class ReferenceBackend:
    """Gathers the keys of each segment and materialises all its scores.

    Any floating dtype and device. Memory grows with rows x keys: for tests and for proofs.
    Slots that no row of a segment may see are never read into its output.
    """

    name = "reference"
    can_record = False

    def prepare(
        self, batch: AttentionBatch, window: int | None, device: torch.device
    ) -> tuple[_DenseSegment, ...]:
        """Slots and visibility of every segment (see ``AttentionBackend``)."""
        prepared = []
        for segment in batch.of_kept_keys().segments:
            slots = slots_of(segment.pages, 0, segment.num_keys, batch.page_size)
            row_position = segment.first_position + np.arange(segment.num_rows, dtype=np.int64)
            key_position = segment.first_key + np.arange(segment.num_keys, dtype=np.int64)
            distance = row_position[:, None] - key_position
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            seen = visible.any(axis=0)
            prepared.append(
                _DenseSegment(
                    first_row=segment.first_row,
                    num_rows=segment.num_rows,
                    slots=torch.from_numpy(slots[seen]).to(device),
                    visible=torch.from_numpy(visible[:, seen]).to(device),
                )
            )
        return tuple(prepared)

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: tuple[_DenseSegment, ...],
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``), computed in float32 or wider."""
        num_kv_heads = k_KSD.shape[0]
        wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        out_THD = torch.zeros_like(q_THD)
        lse_TH = torch.full(q_THD.shape[:2], -torch.inf, dtype=wide, device=q_THD.device)
        for segment in prepared:
            rows = slice(segment.first_row, segment.first_row + segment.num_rows)
            q_TKGD = q_THD[rows].to(wide).unflatten(1, (num_kv_heads, -1))
            k_KSD_seen = k_KSD[:, segment.slots].to(wide)
            v_KSD_seen = v_KSD[:, segment.slots].to(wide)
            score_KGTS = torch.einsum("tkgd,ksd->kgts", q_TKGD, k_KSD_seen) * scale
            score_KGTS = score_KGTS.masked_fill(~segment.visible, -torch.inf)
            lse_KGT = torch.logsumexp(score_KGTS, dim=-1)
            # A row that sees no key has only -inf: shifted by 0 its weights are 0, not nan.
            shift_KGT = lse_KGT.masked_fill(lse_KGT.isneginf(), 0.0)
            weight_KGTS = torch.exp(score_KGTS - shift_KGT.unsqueeze(-1))
            out_TKGD = torch.einsum("kgts,ksd->tkgd", weight_KGTS, v_KSD_seen)
            out_THD[rows] = out_TKGD.flatten(1, 2).to(q_THD.dtype)
            lse_TH[rows] = lse_KGT.permute(2, 0, 1).flatten(1)
        return out_THD, lse_TH if return_lse else None
