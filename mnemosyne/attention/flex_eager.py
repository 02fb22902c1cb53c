"""FlexAttention without code generation: gathered keys, scores materialised a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import pad

from mnemosyne.attention.flex_compiled import own_code
from mnemosyne.attention.masks import NO_WINDOW
from mnemosyne.attention.segments import Segment
from mnemosyne.cache.layout import slots_of

MAX_SCORES = 2**24  # scores that exist at a time, or those of one row


@dataclass(frozen=True, slots=True, eq=False)
class DenseSegment:
    """One segment and the slots of the keys that some row of it sees."""

    first_row: int
    num_rows: int
    slots: Tensor  # int64 [num_keys + 1], the last one twice
    distance: int  # position of the first row minus that of the first of these keys
    reach: int  # a row sees this many positions, its own included


def dense_segments(
    segments: Sequence[Segment], window: int | None, page_size: int, device: torch.device
) -> list[DenseSegment]:
    """Slots to gather for each segment; segments whose rows see no key are left out."""
    reach = NO_WINDOW if window is None else window
    dense = []
    for segment in segments:
        distance = segment.first_position - segment.first_key
        first = max(0, distance - reach + 1)
        stop = min(segment.num_keys, distance + segment.num_rows)
        if first < stop:
            slots = torch.from_numpy(slots_of(segment.pages, first, stop - first, page_size))
            slots = torch.cat((slots, slots[-1:])).to(device)
            dense.append(
                DenseSegment(segment.first_row, segment.num_rows, slots, distance - first, reach)
            )
    return dense


class EagerFlex:
    """Runs FlexAttention's mathematics eagerly; any dtype from float16 to float64, any device."""

    def __init__(self) -> None:
        # The "eager" backend runs torch's own operations; dynamic, so that it traces them once.
        self._attention = torch.compile(
            own_code(_dense_attention), backend="eager", fullgraph=True, dynamic=True
        )

    def partials(
        self,
        q_TKGD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        segments: list[DenseSegment],
        *,
        scale: float,
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, ``out_TKGD`` and ``lse_TKG`` of each tile of rows."""
        num_kv_heads, group = q_TKGD.shape[1:3]
        for segment in segments:
            k, v = (part.index_select(1, segment.slots).unsqueeze(0) for part in (k_KSD, v_KSD))
            num_keys = k.shape[2] - 1
            tile_rows = max(1, MAX_SCORES // (num_keys * num_kv_heads * group))
            for first in range(0, segment.num_rows, tile_rows):
                num_rows = min(tile_rows, segment.num_rows - first)
                rows = slice(segment.first_row + first, segment.first_row + first + num_rows)
                # torch.compile makes one row or one key a case of its own: always one more.
                q_HTD = pad(q_TKGD[rows].flatten(1, 2), (0, 0, 0, 0, 0, 1)).transpose(0, 1)
                bounds = torch.tensor(
                    (segment.distance + first, num_keys, segment.reach), device=k.device
                )
                out_HTD, lse_HT = self._attention(q_HTD.unsqueeze(0), k, v, bounds, scale)
                out_THD = out_HTD[0, :, :num_rows].transpose(0, 1)
                lse_TH = lse_HT[0, :, :num_rows].transpose(0, 1)
                heads = (num_kv_heads, group)
                yield rows, out_THD.unflatten(1, heads), lse_TH.unflatten(1, heads)


def _dense_attention(
    q_1HTD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    def masked(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        row = bounds[0] + t
        is_visible = (s <= row) & (s < bounds[1]) & (s > row - bounds[2])
        return torch.where(is_visible, score, -torch.inf)

    result: Any = flex_attention(
        q_1HTD,
        k_1KSD,
        v_1KSD,
        score_mod=masked,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return result[0], result[1].lse
