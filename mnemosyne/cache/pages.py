"""The tensors of the cache: one pool of keys and one of values per layer, head-major."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mnemosyne import memory_limits
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.page_ids import PageIds
from mnemosyne.kernels.cpu.memory import huge_zeros


class PagePool:
    """K and V of every local layer, ``[K, S, D]`` with ``S = (num_pages + 1) * page_size`` slots.

    Head-major, so that a run of neighbouring pages is one contiguous stream per head. One page
    more than the allocator knows stands at the end: padding rows of a step write there. Behind it
    are pages for keys that layers with a window forget before their step is over.
    All slots start as zero, because a backend may read (and weigh with 0) slots nobody wrote.

    Layers in several tracks share tensors, in pages of their own.

    Args:
        num_pages: pages to hand out.
        page_size: tokens per page.
        num_layers: local layers.
        kinds: of all layers of the model; None: each keeps every key.
        windows: of the local layers.
        max_rows: of a step in layers that forget.
        num_kv_heads: local KV heads.
        head_dim: elements per head.
        dtype: of keys and values.
        device: where the pool lives.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kinds: PageKinds | None = None,
        windows: Sequence[int | None] = (),
        max_rows: int = 0,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.padding_slot = num_pages * page_size
        self.kinds = kinds or PageKinds(page_size)
        self.tracks = self.kinds.tracks_of(windows or [None] * num_layers)  # of the layers
        self.first_passing = num_pages + 1
        self.num_passing = self.kinds.num_passing(max_rows)
        self.ids = PageIds(num_pages, device)  # of running sequences
        self.ring_ids = [
            PageIds(num_pages + self.num_passing, device, window.tracks)
            for window in self.kinds.windows
        ]
        num_slots = (self.first_passing + self.num_passing) * page_size
        shape = (num_kv_heads, num_slots, head_dim)
        where = [self.tracks[:layer].count(track) for layer, track in enumerate(self.tracks)]
        keys, values = (
            [_zeros(shape, dtype, device) for _ in range(1 + max(where))] for _ in range(2)
        )
        self._tensors = *keys, *values
        self.k: Sequence[Tensor] = [keys[index] for index in where]  # of each layer
        self.v: Sequence[Tensor] = [values[index] for index in where]

    @property
    def ring_tracks(self) -> list[Tensor]:
        """Page ids of running sequences in each track of layers that forget."""
        return [track for page_ids in self.ring_ids for track in page_ids.tracks]

    @property
    def track_ids(self) -> list[Tensor]:
        """Page ids of running sequences in every track."""
        return [*([self.ids.tensor] if self.kinds.keeps else []), *self.ring_tracks]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Give some pages the keys and values of others; all are read before any is written."""
        read, written = (self._slots(np.array(ids, dtype=np.int64)) for ids in (sources, targets))
        for pool in self._tensors:
            pool[:, written] = pool[:, read]

    def move(self, layer: int, sources_M: Tensor, targets_M: Tensor) -> None:
        """Give some slots of a layer the keys and values of others.

        Args:
            layer: index among the local layers.
            sources_M: slots to read, int64.
            targets_M: slots to write.
        """
        for pool in (self.k[layer], self.v[layer]):
            pool[:, targets_M] = pool[:, sources_M]

    def clear(self, pages: np.ndarray) -> None:
        """Zero some pages: what a failed request left there may not be finite."""
        slots = self._slots(pages)
        for pool in self._tensors:
            pool.index_fill_(1, slots, 0)

    def _slots(self, pages: np.ndarray) -> Tensor:
        """All slots of some pages, int64, where the pool is."""
        first_slots = torch.from_numpy(pages * self.page_size)
        offsets = torch.arange(self.page_size, dtype=torch.int64)
        return (first_slots[:, None] + offsets).flatten().to(self._tensors[0].device)

    def clear_passing(self) -> None:
        """Zero what chunks wrote in passing, if it may not be finite."""
        self.clear(self.first_passing + np.arange(self.num_passing, dtype=np.int64))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    num_bytes = memory_limits.free_memory()
    if num_bytes is None:
        raise ValueError(
            "cache.max_tokens must be set on this system, which does not tell its free memory; "
            "write cache.max_tokens=1M"
        )
    return num_bytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # A pool may be declared larger than what a run ends up using.
    return huge_zeros(shape, dtype)
