"""The keys that each query row of a step may see: the contract of runtime and backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.page_ids import id_dtype


class Segment(NamedTuple):
    """Consecutive query rows of one sequence, and the local shard of its cache.

    A row at position p sees local key j, which stands at position ``first_key + j``, if
    ``first_key + j <= p`` and, under a sliding window w, ``first_key + j > p - w``.
    Local key j lives in slot ``pages[j // page_size] * page_size + j % page_size`` of the pool.
    Segments may share pages (a common prefix); a page then holds the same positions in all.
    Layers with a window may keep no pages of the first keys, which no row sees under it:
    ``pages`` then begin after ``num_gone`` of them, and key j lies in ``pages[j // page_size -
    num_gone]``. The same keys stand at the same index all the same, so that a backend may cut
    them alike.

    A tuple, because a step may hold a thousand of them.
    """

    first_row: int  # index into the packed rows T
    num_rows: int
    first_position: int  # position of the first row; the others follow it one by one
    num_keys: int  # local keys, those that this step writes included
    pages: np.ndarray  # int64 [ceil(num_keys / page_size) or more], page ids in key order
    first_key: int = 0  # position of the first local key; above 0 only on later kvp groups
    first_page: int = 0  # where its ids begin in the ``page_ids`` of the batch, if it has those
    num_gone: int = 0  # pages before the first of ``pages``

    @property
    def page_of_key_0(self) -> int:
        """Where in ``page_ids`` the page of local key 0 is, or would be if it were kept."""
        return self.first_page - self.num_gone


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """All segments of a step. Rows that no segment holds (padding) get (0, -inf)."""

    segments: tuple[Segment, ...]
    num_rows: int  # T, padding included
    page_size: int  # N
    page_ids: Tensor | None = None  # ids of all sequences, in a tensor that outlives the step

    def with_page_ids(self, device: torch.device) -> AttentionBatch:
        """The same with ``page_ids``: its own, or else those of its segments laid out."""
        if self.page_ids is not None:
            return self
        segments, pages, end = [], [np.empty(0, dtype=np.int64)], 0
        for segment in self.segments:
            segments.append(segment._replace(first_page=end))
            num_pages = pages_for(segment.num_keys, self.page_size) - segment.num_gone
            pages.append(segment.pages[:num_pages])
            end += len(pages[-1])
        page_ids = torch.from_numpy(np.concatenate(pages)).to(device, id_dtype(device))
        return replace(self, segments=tuple(segments), page_ids=page_ids)

    def of_kept_keys(self) -> AttentionBatch:
        """The same with segments that begin at the first key whose page they have."""
        if not any(segment.num_gone for segment in self.segments):
            return self
        return replace(self, segments=tuple([_of_kept(s, self.page_size) for s in self.segments]))


def _of_kept(segment: Segment, page_size: int) -> Segment:
    num_gone = segment.num_gone * page_size
    return segment._replace(
        num_keys=segment.num_keys - num_gone, first_key=segment.first_key + num_gone, num_gone=0
    )


class AttentionBackend(Protocol):
    """One way to compute exact attention over a paged cache.

    ``prepare`` runs once per step and window; its result is opaque and shared by all layers with
    that window. ``attend`` runs once per layer.
    """

    name: str
    can_record: bool  # whether ``fixed`` gives a backend whose calls can be repeated

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> Any:
        """Turn the segments into whatever ``attend`` needs: runs, block masks, page tables."""

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: Any,
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows over the pool.

        Args:
            q_THD: packed queries, any floating dtype.
            k_KSD: the keys of the whole pool, S = num_pages * page_size, dtype of ``q_THD``.
            v_KSD: the values of the whole pool, likewise.
            prepared: what ``prepare`` gave for this step and window.
            scale: factor on the scores, usually 1/sqrt(D).
            return_lse: whether the LSE is wanted (partials of a sharded cache need it).

        Returns:
            ``out_THD`` in the dtype of ``q_THD`` and, if asked for, ``lse_TH`` in float32
            (float64 for float64 input), natural log, -inf for a row that saw no key.
        """


class RecordableBackend(AttentionBackend, Protocol):
    """A backend that ``can_record``."""

    def fixed(
        self, k_KSD: Tensor, *, num_rows: int, page_size: int, page_ids: Tensor
    ) -> AttentionBackend:
        """The same for steps of a fixed number of one-row sequences.

        Its ``prepare`` refills tables that stay in place, and its ``attend`` makes the same calls
        whatever they hold, so that whoever repeats the calls computes the step.

        Args:
            k_KSD: the keys of the pool, for their heads, dtype and device.
            num_rows: T of every step, padding included.
            page_size: tokens per page.
            page_ids: the ``page_ids`` of every step.
        """


class Attend(Protocol):
    """The call of a model layer: store this step's K and V, then attend.

    The layer hands over its index and its projections; pages, masks and the rest of the
    batch stay on this side.
    """

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        sink_H: Tensor | None = None,
    ) -> Tensor:
        """Return ``out_THD`` in the dtype of ``q_THD``.

        Args:
            layer: index among the local layers.
            q_THD: queries.
            k_TKD: keys.
            v_TKD: values.
            rotary: cos and sin that queries and keys are still to be rotated by, both [T, D/2].
            sink_H: logits of keys that take a share of each row's attention and give nothing.
        """


def slot_runs(pages: np.ndarray, num_keys: int, page_size: int) -> Iterator[tuple[int, int, int]]:
    """Maximal runs of neighbouring slots that hold neighbouring keys.

    Args:
        pages: int64 page ids in key order.
        num_keys: keys to cover.
        page_size: tokens per page.

    Yields:
        ``(first_key, first_slot, length)`` of each run, in key order.
    """
    num_pages = -(-num_keys // page_size)
    used = pages[:num_pages]
    breaks = np.flatnonzero(np.diff(used) != 1) + 1
    starts = [0, *breaks.tolist(), num_pages] if num_pages else [0]
    for start, stop in pairwise(starts):
        first_key = start * page_size
        length = min(stop * page_size, num_keys) - first_key
        yield first_key, int(used[start]) * page_size, length
