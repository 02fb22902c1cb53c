"""Pages and slots of positions, and how many pages tables may list."""

from __future__ import annotations

import numpy as np

LISTED_PER_PAGE = 32  # pages that the tables of a group list at most, per page that it has


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold ``num_tokens`` tokens."""
    return -(-num_tokens // page_size)


def slots_of(pages: np.ndarray, start: int, num_tokens: int, page_size: int) -> np.ndarray:
    """Slots of consecutive positions.

    Args:
        pages: int64 page ids in key order.
        start: the first position.
        num_tokens: how many.
        page_size: tokens per page.

    Returns:
        int64 ``[num_tokens]`` indices into the slots of the pool.
    """
    positions = np.arange(start, start + num_tokens, dtype=np.int64)
    return pages[positions // page_size] * page_size + positions % page_size
