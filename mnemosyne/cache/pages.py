"""The tensors of the cache: one pool of keys and one of values per layer, head-major."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mnemosyne import memory_limits
from mnemosyne.cache.page_ids import PageIds
from mnemosyne.kernels.cpu.memory import huge_zeros


class PagePool:
    """K and V of every local layer, ``[K, S, D]`` with ``S = (num_pages + 1) * page_size`` slots.

    Head-major, so that a run of neighbouring pages is one contiguous stream per head. One page
    more than the allocator knows stands at the end: padding rows of a step write there.
    All slots start as zero, because a backend may read (and weigh with 0) slots nobody wrote.

    Args:
        num_pages: pages to hand out.
        page_size: tokens per page.
        num_layers: local layers.
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
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.padding_slot = num_pages * page_size
        self.ids = PageIds(num_pages, device)  # of running sequences
        shape = (num_kv_heads, (num_pages + 1) * page_size, head_dim)
        self.k: Sequence[Tensor] = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.v: Sequence[Tensor] = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def copy(self, source: int, target: int) -> None:
        """Give one page the keys and values of another."""
        first, others = source * self.page_size, target * self.page_size
        for pool in (*self.k, *self.v):
            pool[:, others : others + self.page_size] = pool[:, first : first + self.page_size]

    def clear(self, pages: np.ndarray) -> None:
        """Zero some pages: what a failed request left there may not be finite."""
        first_slots = torch.from_numpy(pages * self.page_size)
        offsets = torch.arange(self.page_size, dtype=torch.int64)
        slots = (first_slots[:, None] + offsets).flatten()
        for pool in (*self.k, *self.v):
            pool.index_fill_(1, slots.to(pool.device), 0)


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
