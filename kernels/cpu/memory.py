"""Memory on CPU: in huge pages, where long reads spare the TLB, and kept when it is freed."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page, and what a tensor must have to be worth one
KEPT = 512 << 20  # bytes that may be free and still be this process's
_MOST_ONCE = 32 << 20  # of one allocation that an older glibc keeps
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's mallopt


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no room before they are written, aligned for huge pages.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    num_elements = math.prod(shape)
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < HUGE:
        return torch.zeros(shape, dtype=dtype)
    # Private: memory that could be shared gets no huge pages on most systems.
    buffer = mmap.mmap(-1, num_bytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(buffer, dtype=torch.uint8, count=1).data_ptr() % HUGE
    return torch.frombuffer(buffer, dtype=dtype, count=num_elements, offset=offset).view(shape)


def keep_freed() -> None:
    """Have what is freed serve the next allocations of this process, in place of the system.

    The tensors of a step come and go, some of them of megabytes, which the allocator would fetch
    from the system each time: a page fault for every 4 KiB. One arena serves all threads, because
    those of single threads shrink whatever is asked. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(_MMAP_THRESHOLD, KEPT):
        mallopt(_MMAP_THRESHOLD, _MOST_ONCE)
    mallopt(_TRIM_THRESHOLD, KEPT)
    mallopt(_ARENA_MAX, 1)
