"""The rows of a step in layers that forget: pages of rings, and those that a chunk passes by."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBatch, Segment
from mnemosyne.cache.page_ids import PageIds
from mnemosyne.cache.pages import PagePool
from mnemosyne.schedule.plan import Chunk


class TrackRows(NamedTuple):
    """The rows of a step as the layers of one track see them.

    A chunk may hold more keys than a ring has room for. Those that do not fit lie in the passing
    pages while a layer attends; then the last of them move to the ring, and the next layer writes
    over the rest.
    """

    slots_T: Tensor  # int64, where each row's K and V go
    batch: AttentionBatch  # rows whose keys are all here
    shared: AttentionBatch | None = None  # rows that other groups compute as well
    moves: tuple[Tensor, Tensor] | None = None  # slots, from and to, once attention is computed


class RingChunk(NamedTuple):
    """A chunk whose windows are on this rank."""

    chunk: Chunk
    first_row: int
    rings: tuple[np.ndarray, ...]  # of its request


class _Window(NamedTuple):
    """The pages of one chunk in the layers of a window."""

    first: int  # page of the first key that a row sees
    last: int  # page of the last row
    num_passing: int  # of them, those for which the ring has no room
    first_passing: int  # among the passing pages
    number: int  # of the chunk, among those that pass


def enter_rings(pool: PagePool, request_id: int, rings: Sequence[np.ndarray]) -> None:
    """Write the ring of a request twice: so any part of it lies in key order somewhere."""
    for page_ids, ring in zip(pool.ring_ids, rings, strict=False):  # or none are here
        page_ids.enter(request_id, np.concatenate([ring, ring], axis=1))


def drop_rings(pool: PagePool, request_id: int) -> None:
    """Forget the rings of a request."""
    for page_ids in pool.ring_ids:
        page_ids.drop(request_id)


def ring_rows(
    pool: PagePool,
    chunks: Sequence[RingChunk],
    num_rows: int,
    shared_ids: Collection[int] | None,
    device: torch.device,
) -> list[TrackRows]:
    """Rows by track of each window.

    Args:
        pool: whose pages they are.
        chunks: those of the step whose windows are here.
        num_rows: T, padding included.
        shared_ids: requests whose rows other groups compute as well; None if there are none.
        device: where tensors go.
    """
    tracks = []
    for index, (window, page_ids) in enumerate(zip(pool.kinds.windows, pool.ring_ids, strict=True)):
        kind = _Kind(pool, page_ids, window.size, [each.rings[index] for each in chunks])
        kind.lay_out(chunks)
        tracks += kind.rows(chunks, num_rows, shared_ids, device)
    return tracks


class _Kind:
    """The rows of a step in the layers of one window.

    Args:
        pool: of the pages.
        page_ids: of the rings of its requests.
        size: of the window.
        rings: of each chunk.
    """

    def __init__(
        self, pool: PagePool, page_ids: PageIds, size: int, rings: Sequence[np.ndarray]
    ) -> None:
        self._pool = pool
        self._page_ids = page_ids
        self._size = size
        self._rings = rings
        self._windows: list[_Window] = []

    def lay_out(self, chunks: Sequence[RingChunk]) -> None:
        """Find the pages of every chunk, and write the ids of those that a ring cannot hold."""
        page_size, num_passing, number = self._pool.page_size, 0, 0
        while self._page_ids.drop(_in_step(number)):  # of the step before
            number += 1
        number = 0
        for (chunk, _, _), ring in zip(chunks, self._rings, strict=True):
            first = max(0, chunk.start - self._size + 1) // page_size
            last = (chunk.start + chunk.num_tokens - 1) // page_size
            passing = max(0, last + 1 - first - ring.shape[1])
            self._windows.append(_Window(first, last, passing, num_passing, number))
            if passing:
                self._enter_passing(ring, self._windows[-1])
                number += 1
            num_passing += passing
        assert num_passing <= self._pool.num_passing, "a step has no more rows than were told"

    def _enter_passing(self, ring: np.ndarray, window: _Window) -> None:
        turned = np.roll(ring, -(window.first % ring.shape[1]), axis=1)
        ids = self._pool.first_passing + window.first_passing + np.arange(window.num_passing)
        passing = np.broadcast_to(ids, (len(ring), len(ids)))
        self._page_ids.enter(_in_step(window.number), np.concatenate([turned, passing], axis=1))

    def rows(
        self,
        chunks: Sequence[RingChunk],
        num_rows: int,
        shared_ids: Collection[int] | None,
        device: torch.device,
    ) -> list[TrackRows]:
        """The rows in each track."""
        tracks = range(len(self._page_ids.tracks))
        slots_LT = np.full((len(tracks), num_rows), self._pool.padding_slot, dtype=np.int64)
        own: list[list[Segment]] = [[] for _ in tracks]
        common: list[list[Segment]] = [[] for _ in tracks]
        moves: list[np.ndarray] = []
        for each, ring, window in zip(chunks, self._rings, self._windows, strict=True):
            chunk, row, _ = each
            slots_LT[:, row : row + chunk.num_tokens] = self._slots(chunk, ring, window)
            if window.num_passing:
                moves.append(self._moves(chunk, ring, window))
            is_shared = shared_ids is not None and chunk.request_id in shared_ids
            segments = common if is_shared else own
            for track, segment in enumerate(self._segments(each, ring, window)):
                segments[track].append(segment)
        slots = torch.from_numpy(slots_LT).to(device)
        moved = torch.from_numpy(np.concatenate(moves, axis=2)).to(device) if moves else None
        found = []
        for track, page_ids in enumerate(self._page_ids.tracks):
            at = num_rows, self._pool.page_size, page_ids
            batch = AttentionBatch(tuple(own[track]), *at)
            shared = None if shared_ids is None else AttentionBatch(tuple(common[track]), *at)
            move = None if moved is None else (moved[0, track], moved[1, track])
            found.append(TrackRows(slots[track], batch, shared, move))
        return found

    def _slots(self, chunk: Chunk, ring: np.ndarray, window: _Window) -> np.ndarray:
        """Slots of the rows of a chunk, int64 ``[tracks, T]``, or ``[tracks, 1]`` of a decode."""
        page_size, num_pages = self._pool.page_size, ring.shape[1]
        if chunk.num_tokens == 1:
            page, offset = divmod(chunk.start, page_size)
            return ring[:, page % num_pages, None] * page_size + offset
        positions = np.arange(chunk.start, chunk.start + chunk.num_tokens, dtype=np.int64)
        pages, offsets = np.divmod(positions, page_size)
        passing = pages - window.first - num_pages  # among those of the chunk, if not negative
        ids = self._pool.first_passing + window.first_passing + passing
        return np.where(passing < 0, ring[:, pages % num_pages], ids) * page_size + offsets

    def _moves(self, chunk: Chunk, ring: np.ndarray, window: _Window) -> np.ndarray:
        """Slots that a chunk filled in passing and that move to the ring, int64 ``[2, L, M]``."""
        page_size, num_pages = self._pool.page_size, ring.shape[1]
        first_passing = window.first + num_pages
        first = max(first_passing, window.last + 1 - num_pages) * page_size
        pages, offsets = np.divmod(np.arange(first, chunk.start + chunk.num_tokens), page_size)
        ids = self._pool.first_passing + window.first_passing + pages - first_passing
        found = np.empty((2, len(ring), len(pages)), dtype=np.int64)
        found[0] = ids * page_size + offsets
        found[1] = ring[:, pages % num_pages] * page_size + offsets
        return found

    def _segments(self, each: RingChunk, ring: np.ndarray, window: _Window) -> Iterator[Segment]:
        """The segment of a chunk, by track."""
        chunk, row, _ = each
        key: Hashable = chunk.request_id
        turn = window.first % ring.shape[1]
        if window.num_passing:
            key, turn = _in_step(window.number), 0
        stop, first_page = chunk.start + chunk.num_tokens, self._page_ids.first(key) + turn
        for pages in self._page_ids.pages(key)[:, turn:]:
            yield Segment(
                row, chunk.num_tokens, chunk.start, stop, pages, 0, first_page, window.first
            )


def _in_step(number: int) -> tuple[int, str]:
    """Key of the pages that a chunk of the step at hand sees, if it passes some by."""
    return number, "in a step"
