"""FlexAttention without code generation: gathered keys, scores materialised a tile at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from mnemosyne.attention.flex_compiled import mark_dynamic, own_code
from mnemosyne.attention.masks import NO_WINDOW
from mnemosyne.attention.segments import Segment
from mnemosyne.cache.layout import slots_of

MAX_SCORES = 2**24  # scores that exist at a time, or those of one row per segment
FEW_KEYS = 256  # decodes of fewer keys share a call, however much they differ


@dataclass(frozen=True, slots=True, eq=False)
class DenseCall:
    """One chunk, or decodes of similar length along the batch, each with its own keys.

    No segment reads the keys of another: a nan of one request stays with it. One key and one row
    more than needed, which see nothing and are not seen, because torch.compile makes a single one
    a case of its own.
    """

    rows_BT: Tensor  # int64, packed rows; the last column is padding
    slots_BS: Tensor  # int64; shorter lists repeat their last slot
    low_BT: Tensor  # int64, a row sees the keys from low to high
    high_BT: Tensor  # int64


def dense_calls(
    segments: Sequence[Segment], window: int | None, page_size: int, device: torch.device
) -> list[DenseCall]:
    """The calls of a step; segments whose rows see no key are left out."""
    groups: dict[tuple[int, int], list[tuple[Segment, range]]] = {}
    for index, segment in enumerate(segments):
        keys = _seen_keys(segment, window)
        if keys and segment.num_rows == 1:
            length = max(FEW_KEYS, len(keys)).bit_length()
            groups.setdefault((length, 0), []).append((segment, keys))
        elif keys:
            groups[0, index] = [(segment, keys)]
    return [_dense_call(group, window, page_size, device) for group in groups.values()]


class EagerFlex:
    """Runs FlexAttention by torch's own operations; float16 to float64, any device."""

    def __init__(self) -> None:
        self._traced: dict[tuple[object, ...], Callable[..., tuple[Tensor, Tensor]]] = {}

    def partials(
        self,
        q_TKGD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        calls: Sequence[DenseCall],
        *,
        scale: float,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, ``out_TKGD`` and ``lse_TKG`` of each tile of rows."""
        heads = q_TKGD.shape[1:3]
        q_THD = q_TKGD.flatten(1, 2)
        for call in calls:
            k, v = (pool[:, call.slots_BS].transpose(0, 1) for pool in (k_KSD, v_KSD))
            scores_per_row = call.slots_BS.numel() * q_THD.shape[1]
            tile_rows = max(1, MAX_SCORES // scores_per_row)
            for first in range(0, call.rows_BT.shape[1] - 1, tile_rows):
                tile = slice(first, first + tile_rows + 1)
                rows_BT = call.rows_BT[:, tile]
                low_BT, high_BT = (x[:, tile].contiguous() for x in (call.low_BT, call.high_BT))
                q_BHTD = q_THD[rows_BT].transpose(1, 2)
                out, lse = self._attend(q_BHTD, k, v, low_BT, high_BT, scale)
                out_THD, lse_TH = (
                    x[:, :, :-1].transpose(1, 2).flatten(0, 1).unflatten(1, heads)
                    for x in (out, lse)
                )
                yield rows_BT[:, :-1].flatten(), out_THD, lse_TH

    def _attend(
        self, q_BHTD: Tensor, k: Tensor, v: Tensor, low_BT: Tensor, high_BT: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """One trace for each number of heads and dtype, with and without a batch."""
        is_batch = q_BHTD.shape[0] > 1
        key = (q_BHTD.shape[1], *k.shape[1::2], q_BHTD.dtype, q_BHTD.device, is_batch)
        if key not in self._traced:
            self._traced[key] = torch.compile(
                own_code(_dense_attention), backend="eager", fullgraph=True, dynamic=False
            )
        # By name: dynamic=True would take sizes that happen to agree, B and K say, for the same.
        mark_dynamic((q_BHTD, 2), (k, 2), (v, 2), (low_BT, 1), (high_BT, 1))
        if is_batch:
            mark_dynamic(*((x, 0) for x in (q_BHTD, k, v, low_BT, high_BT)))
        return self._traced[key](q_BHTD, k, v, low_BT, high_BT, scale)


def _dense_attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, low_BT: Tensor, high_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    def masked(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.where((low_BT[b, t] <= s) & (s < high_BT[b, t]), score, -torch.inf)

    result: Any = flex_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        score_mod=masked,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return result[0], result[1].lse


def _seen_keys(segment: Segment, window: int | None) -> range:
    """Local keys that some row of the segment sees."""
    distance = segment.first_position - segment.first_key
    start = 0 if window is None else max(0, distance - window + 1)
    return range(start, min(segment.num_keys, distance + segment.num_rows))


def _dense_call(
    group: list[tuple[Segment, range]], window: int | None, page_size: int, device: torch.device
) -> DenseCall:
    group = group * 2 if len(group) == 1 and group[0][0].num_rows == 1 else group
    num_rows = group[0][0].num_rows
    num_keys = max(len(keys) for _, keys in group)
    rows, low, high = np.zeros((3, len(group), num_rows + 1), dtype=np.int64)
    slots = np.empty((len(group), num_keys + 1), dtype=np.int64)
    reach = NO_WINDOW if window is None else window
    for entry, (segment, keys) in enumerate(group):
        slots[entry, : len(keys)] = slots_of(segment.pages, keys.start, len(keys), page_size)
        slots[entry, len(keys) :] = slots[entry, len(keys) - 1]
        rows[entry, :-1] = segment.first_row + np.arange(num_rows)
        # The row's own position, counted in keys of this call.
        own = segment.first_position - segment.first_key - keys.start + np.arange(num_rows)
        low[entry, :-1] = np.maximum(0, own - reach + 1)
        high[entry, :-1] = np.minimum(len(keys), own + 1)
    return DenseCall(*(torch.from_numpy(table).to(device) for table in (rows, slots, low, high)))
