"""Decodes by the Triton kernels with a launch that never changes, so that it can be replayed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBatch
from mnemosyne.attention.tiles import cut_rows, most_items, split_keys
from mnemosyne.attention.triton import MIN_SPLIT_KEYS, TritonBackend, num_programs
from mnemosyne.kernels.paged_decode import paged_decode
from mnemosyne.kernels.tile import Tiles


class FixedDecodes:
    """The Triton backend for steps of a fixed number of rows, each a sequence of its own.

    Grid, buffers and addresses depend on the number of rows alone: ``prepare`` copies what a step
    holds into tables that stay in place, and has whoever replays the launches of ``attend``
    compute that step. Items that a step does not need hold no key; every row is merged, from none
    or one or several partials, which gives the bits of ``TritonBackend``.

    Args:
        backend: how the kernel is built.
        k_KSD: the keys of the pool, for their heads, dtype and device.
        num_rows: T of every step, padding included.
        page_size: tokens per page.
        page_ids: the ``page_ids`` of every step.
    """

    name = "triton"
    can_record = False

    def __init__(
        self,
        backend: TritonBackend,
        k_KSD: Tensor,
        *,
        num_rows: int,
        page_size: int,
        page_ids: Tensor,
    ) -> None:
        self._config = backend.config("decode", k_KSD, page_size)
        self._num_rows = num_rows
        self._page_size = page_size
        self._page_ids = page_ids
        self._num_shares = num_programs(self._config, k_KSD.device) // k_KSD.shape[0]
        self._num_items = most_items(num_rows, self._num_shares)
        self._tables: dict[int | None, Tiles] = {}  # by window

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> Tiles:
        """Enter a step in the tables of a window; made at the first call, the same ever after."""
        assert batch.num_rows == self._num_rows
        assert batch.page_size == self._page_size
        assert all(segment.num_rows == 1 for segment in batch.segments)
        if window not in self._tables:
            self._tables[window] = self._new_tables(device)
        assert batch.page_ids is self._page_ids or not batch.segments
        tables, (items, merges) = self._tables[window], self._rows_of_tables(batch, window)
        # From memory that is not pinned, so the copies are done with it when they return.
        tables.items.copy_(torch.from_numpy(items))
        tables.merges.copy_(torch.from_numpy(merges))
        return tables

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: Tiles,
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``)."""
        assert len(q_THD) == self._num_rows
        wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=wide, device=q_THD.device)
        q_THD = q_THD if q_THD.stride(-1) == 1 else q_THD.contiguous()
        paged_decode(
            *(q_THD, k_KSD, v_KSD, out_THD, lse_TH, prepared),
            page_size=self._page_size,
            scale=scale,
            config=self._config,
        )
        return out_THD, lse_TH if return_lse else None

    def _new_tables(self, device: torch.device) -> Tiles:
        return Tiles(
            items=torch.zeros((self._num_items, 8), dtype=torch.int64, device=device),
            whole_items=torch.empty((0, 8), dtype=torch.int64, device=device),
            merges=torch.zeros((self._num_rows, 4), dtype=torch.int64, device=device),
            pages=self._page_ids,
            num_partials=self._num_items + 1,
            most_parts=self._num_items,
            num_rows=self._num_rows,
        )

    def _rows_of_tables(
        self, batch: AttentionBatch, window: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Items and merges of a step, as many as ever."""
        used, merged, num_partials = split_keys(
            cut_rows(batch.segments, 1, window),
            num_shares=self._num_shares,
            min_keys=MIN_SPLIT_KEYS["decode"],
            block=self._config.block_n,
            merge_all=True,
        )
        assert num_partials <= self._num_items
        items = np.zeros((self._num_items, 8), dtype=np.int64)
        items[:, 6] = self._num_items  # of those without keys: a partial that no row reads
        items[: len(used)] = used
        merges = np.zeros((self._num_rows, 4), dtype=np.int64)
        merges[:, 0] = np.arange(self._num_rows)  # of no partial, unless the step has some
        merges[merged[:, 0]] = merged
        return items, merges
