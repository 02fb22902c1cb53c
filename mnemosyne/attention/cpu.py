"""Attention on CPU: torch's flash operator over runs of pages, partials merged by log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.lse import merge_into, merge_partials
from mnemosyne.attention.segments import AttentionBatch, Segment
from mnemosyne.attention.spans import Sight, Span, cut_tile, key_runs, row_tiles

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIN_RUN = 256  # keys; shorter runs are gathered, a call or a merge each would cost more
MAX_KEYS = 65536  # per call: on some processors the operator repacks all keys of a call
MAX_GATHERED = 8192  # keys gathered per call
MIN_SHARE = 1024  # keys per thread, below which splitting a row's keys does not pay

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the operator: some rows of a tile over some slots of the pool."""

    rows: slice  # within the tile
    slots: slice | Tensor  # a run, read in place; or int64 indices, gathered
    sight: Sight
    mask: Tensor | None  # float32 [rows, keys], added to the scores; only for BAND


@dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    rows: slice  # of the packed rows
    num_rows: int
    calls: tuple[_Call, ...]


class CpuBackend:
    """Flash attention on CPU, in place over the pool, without a mask that grows with the context.

    The query heads of one KV head are folded into the query length, so that keys are read once
    per KV head. Keys before a chunk are unmasked, its own are causal, and only under a sliding
    window are there masks, a tile wide. Float64, float32, bfloat16, float16; LSE in float32, or
    float64 for float64 input. Slots that no row of a segment may see are never read.

    Temporaries are bounded by a tile of rows (4096, or 256 under a window) and by 8192 gathered
    keys per call, or a tile of them, whatever the context and however fragmented its pages.
    """

    name = "cpu"
    can_record = False

    def prepare(
        self, batch: AttentionBatch, window: int | None, device: torch.device
    ) -> tuple[_Tile, ...]:
        """Cut the segments into calls (see ``AttentionBackend``)."""
        if device.type != "cpu":
            raise ValueError(f"device must be cpu, got {device}; use attention=flex there")
        masks: dict[tuple[int, int, int], Tensor] = {}
        tiles = []
        for segment in batch.of_kept_keys().segments:
            keys = range(segment.first_key, segment.first_key + segment.num_keys)
            for rows in row_tiles(segment, window):
                calls = [
                    call
                    for span in cut_tile(rows, keys, window)
                    for call in _calls(span, rows.start, segment, batch.page_size, window, masks)
                ]
                if calls:
                    first = segment.first_row + rows.start - segment.first_position
                    tiles.append(_Tile(slice(first, first + len(rows)), len(rows), tuple(calls)))
        return tuple(tiles)

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: tuple[_Tile, ...],
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``)."""
        if q_THD.dtype not in CPU_DTYPES:
            raise ValueError(f"q_THD must have a dtype of {CPU_DTYPES}, got {q_THD.dtype}; cast it")
        num_kv_heads = k_KSD.shape[0]
        num_shares = _shares(num_kv_heads, torch.get_num_threads())
        wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        out_THD = torch.zeros_like(q_THD)
        lse_TH = torch.full(q_THD.shape[:2], -torch.inf, dtype=wide)
        q_TKGD = q_THD.unflatten(1, (num_kv_heads, -1))
        out_TKGD = out_THD.unflatten(1, (num_kv_heads, -1))
        lse_TKG = lse_TH.unflatten(1, (num_kv_heads, -1))
        pool = k_KSD.unsqueeze(0), v_KSD.unsqueeze(0)
        for tile in prepared:
            partials = _partials(q_TKGD[tile.rows], pool, tile.calls, scale, num_shares)
            out, lse = _merge(partials, tile)
            out_TKGD[tile.rows] = out
            if return_lse:
                lse_TKG[tile.rows] = lse
        return out_THD, lse_TH if return_lse else None


def _calls(
    span: Span,
    first_position: int,
    segment: Segment,
    page_size: int,
    window: int | None,
    masks: dict[tuple[int, int, int], Tensor],
) -> Iterator[_Call]:
    rows = slice(span.rows.start - first_position, span.rows.stop - first_position)
    local = range(span.keys.start - segment.first_key, span.keys.stop - segment.first_key)
    runs = list(key_runs(segment.pages, local, page_size))
    if span.sight is Sight.FULL:
        for slots in _reads(runs):
            yield _Call(rows, slots, span.sight, None)
        return
    first_slot, length = runs[0]
    slots = slice(first_slot, first_slot + length) if len(runs) == 1 else _indices(runs)
    mask = None
    if span.sight is Sight.BAND:
        assert window is not None, "only a window makes bands"
        distance = span.rows.start - span.keys.start
        key = (distance, len(span.rows), len(span.keys))
        mask = masks.get(key)
        if mask is None:
            mask = masks[key] = _band_mask(*key, window)
    yield _Call(rows, slots, span.sight, mask)


def _reads(runs: list[tuple[int, int]]) -> Iterator[slice | Tensor]:
    """Long runs in place, short ones gathered together; each read of bounded length."""
    short: list[tuple[int, int]] = []
    num_short = 0
    for first_slot, length in runs:
        if length < MIN_RUN and len(runs) > 1:
            if num_short + length > MAX_GATHERED:
                yield _indices(short)
                short, num_short = [], 0
            short.append((first_slot, length))
            num_short += length
            continue
        for start in range(first_slot, first_slot + length, MAX_KEYS):
            yield slice(start, min(start + MAX_KEYS, first_slot + length))
    if short:
        yield _indices(short)


def _indices(runs: list[tuple[int, int]]) -> Tensor:
    first_slots, lengths = np.array(runs, dtype=np.int64).T
    first_keys = np.cumsum(lengths) - lengths
    shift = np.repeat(first_slots - first_keys, lengths)
    return torch.from_numpy(np.arange(len(shift), dtype=np.int64) + shift)


def _band_mask(distance: int, num_rows: int, num_keys: int, window: int) -> Tensor:
    """Mask of rows and keys whose first ones stand ``distance`` positions apart."""
    row, key = torch.arange(num_rows).unsqueeze(1), torch.arange(num_keys)
    behind = distance + row - key
    is_hidden = (behind < 0) | (behind >= window)
    return torch.zeros(num_rows, num_keys).masked_fill_(is_hidden, -torch.inf)


def _shares(num_kv_heads: int, num_threads: int) -> int:
    """Parts to split a lone row's keys into, so that heads x parts keep all threads busy."""
    if num_kv_heads >= 2 * num_threads:
        return 1
    return num_threads // math.gcd(num_kv_heads, num_threads)


def _partials(
    q_TKGD: Tensor,
    pool: tuple[Tensor, Tensor],
    calls: tuple[_Call, ...],
    scale: float,
    num_shares: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows within the tile, ``out_TKGD`` and ``lse_TKG`` of each call."""
    for call in calls:
        q = q_TKGD[call.rows]
        if isinstance(call.slots, slice):
            k, v = (part[:, :, call.slots] for part in pool)
        else:
            k, v = (part.index_select(2, call.slots) for part in pool)
        num_keys = k.shape[2]
        if call.sight is not Sight.FULL:
            yield call.rows, *_per_head(q, k, v, call.mask, scale)
        elif q.shape[0] == 1 and num_shares > 1 and num_keys >= num_shares * MIN_SHARE:
            end = num_keys - num_keys % num_shares
            yield call.rows, *_shared(q, k[:, :, :end], v[:, :, :end], scale, num_shares)
            if end < num_keys:
                yield call.rows, *_folded(q, k[:, :, end:], v[:, :, end:], scale)
        else:
            yield call.rows, *_folded(q, k, v, scale)


def _folded(q_TKGD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All rows see all keys: the G heads of a KV head become rows, which reads its keys once."""
    num_rows, num_kv_heads, group, head_dim = q_TKGD.shape
    if num_rows == 1:
        return _flash(q_TKGD, k_1KSD, v_1KSD, scale=scale)
    q = q_TKGD.transpose(0, 1).reshape(1, num_kv_heads, num_rows * group, head_dim)
    out, lse = _flash(q, k_1KSD, v_1KSD, scale=scale)
    out, lse = out[0].unflatten(1, (num_rows, group)), lse[0].unflatten(1, (num_rows, group))
    return out.transpose(0, 1), lse.transpose(0, 1)


def _per_head(
    q_TKGD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, mask_TS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal, or masked where there is a mask: rows stay rows, the G heads become the batch."""
    group = q_TKGD.shape[2]
    k, v = (part.expand(group, -1, -1, -1) for part in (k_1KSD, v_1KSD))  # stride 0, no copy
    if mask_TS is not None and q_TKGD.dtype == torch.float64:
        mask_TS = mask_TS.double()  # the operator would misread a narrower one
    out, lse = _flash(
        q_TKGD.permute(2, 1, 0, 3), k, v, 0.0, mask_TS is None, attn_mask=mask_TS, scale=scale
    )
    return out.permute(2, 1, 0, 3), lse.permute(2, 1, 0)


def _shared(
    q_1KGD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, scale: float, num_shares: int
) -> tuple[Tensor, Tensor]:
    """One row whose keys are split over the batch, so that few heads keep many threads busy."""
    k, v = (part[0].unflatten(1, (num_shares, -1)).transpose(0, 1) for part in (k_1KSD, v_1KSD))
    out_RKGD, lse_RKG = _flash(q_1KGD.expand(num_shares, -1, -1, -1), k, v, scale=scale)
    out_KGD, lse_KG = merge_partials(out_RKGD.to(lse_RKG.dtype), lse_RKG)
    return out_KGD.unsqueeze(0), lse_KG.unsqueeze(0)


def _merge(partials: Iterator[tuple[slice, Tensor, Tensor]], tile: _Tile) -> tuple[Tensor, Tensor]:
    """The partials of a tile as one; they come one by one, so that only one is held."""
    rows, out, lse = next(partials)
    if rows.stop - rows.start < tile.num_rows:
        whole_out = out.new_zeros((tile.num_rows, *out.shape[1:]), dtype=lse.dtype)
        whole_lse = lse.new_full((tile.num_rows, *lse.shape[1:]), -torch.inf)
        whole_out[rows], whole_lse[rows] = out, lse
        out, lse = whole_out, whole_lse
    for rows, more, more_lse in partials:
        out = out.to(lse.dtype)
        merge_into(out[rows], lse[rows], more, more_lse)
    return out, lse
