"""Page ids of running sequences in one lasting tensor, so that a step need not lay them out."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from mnemosyne.cache.layout import LISTED_PER_PAGE

SPARE = 2  # times what tables may list at most: room for ranges that are not in use any more


def id_dtype(device: torch.device) -> torch.dtype:
    """The integers that the kernels of a device read page ids in."""
    return torch.int64 if device.type == "cpu" else torch.int32


class PageIds:
    """One ragged table: the ids of each sequence lie side by side, somewhere in ``tensor``.

    Where layers lie in several tracks, each has a tensor of its own, and a sequence the same range
    in all of them. A range is written when the table of its sequence changes and read by every
    step after that. New ranges go behind all others; where the end is reached, those in use move
    to the front.

    Args:
        num_pages: of the pool.
        device: of the pool.
        num_tracks: of the layers.

    Attributes:
        tracks: a tensor of ``id_dtype`` for each; they stay in place.
    """

    def __init__(self, num_pages: int, device: torch.device, num_tracks: int = 1) -> None:
        capacity = SPARE * LISTED_PER_PAGE * num_pages
        # on the CPU it takes no memory before it is written
        shape = num_tracks, capacity
        self._ids_LP = torch.zeros(shape, dtype=id_dtype(device), device=device)
        self.tracks = tuple(self._ids_LP)
        self._ranges: dict[Hashable, tuple[int, np.ndarray]] = {}  # by request: where, and which
        self._end = 0  # of the last range

    @property
    def tensor(self) -> Tensor:
        """The ids in the only track, or the first."""
        return self.tracks[0]

    def enter(self, request_id: Hashable, pages: np.ndarray) -> None:
        """Write the ids of a sequence, in place of those that it had.

        Args:
            request_id: of the sequence.
            pages: int64, in key order; ``[tracks, pages]`` or the same in all tracks.
        """
        self.drop(request_id)
        if self._end + pages.shape[-1] > self._ids_LP.shape[1]:
            self._move_to_front()
        self._append(request_id, pages)

    def drop(self, request_id: Hashable) -> bool:
        """Forget a sequence; whether it had a range."""
        return self._ranges.pop(request_id, None) is not None

    def pages(self, request_id: Hashable) -> np.ndarray:
        """The pages of a sequence, as they were entered."""
        return self._ranges[request_id][1]

    def first(self, request_id: Hashable) -> int:
        """The index in ``tensor`` of a sequence's first id, until the next ``enter``."""
        return self._ranges[request_id][0]

    def _append(self, request_id: Hashable, pages: np.ndarray) -> None:
        end = self._end + pages.shape[-1]
        assert end <= self._ids_LP.shape[1], "tables list no more pages than the ledger lets them"
        # a copy, because parts of the allocator's own ids cannot be written to
        self._ids_LP[:, self._end : end].copy_(torch.from_numpy(pages.copy()))
        self._ranges[request_id] = self._end, pages
        self._end = end

    def _move_to_front(self) -> None:
        ranges, self._ranges, self._end = self._ranges, {}, 0
        for request_id, (_, pages) in ranges.items():
            self._append(request_id, pages)
