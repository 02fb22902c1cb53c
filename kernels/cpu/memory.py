"""Memory on CPU in huge pages, where the system gives them: long reads spare the TLB."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page, and what a tensor must have to be worth one


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
