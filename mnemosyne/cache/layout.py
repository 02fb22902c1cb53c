"""Where a position lives: shard, page, slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The part of one request's cache that one group holds."""

    group: int
    pages: np.ndarray  # int64, in key order


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the cache of one request lives: shards of consecutive positions, in order.

    Every shard but the last holds ``shard_tokens`` positions. Pages of all shards are reserved
    from the start; a shard takes part in attention as soon as it holds a key.
    """

    shards: tuple[Shard, ...]
    shard_tokens: int

    def num_active(self, stop: int) -> int:
        """Shards that hold a key once the positions below ``stop`` are computed."""
        return -(-stop // self.shard_tokens)

    def shard_in(self, group: int) -> int | None:
        """Index of the shard that a group holds, None if it holds nothing of the request."""
        return next((i for i, shard in enumerate(self.shards) if shard.group == group), None)

    def positions(self, shard: int, stop: int) -> range:
        """Positions below ``stop`` that a shard holds."""
        first = shard * self.shard_tokens
        return range(first, max(first, min(stop, first + self.shard_tokens)))

    def next_boundary(self, position: int) -> int:
        """The first position after ``position`` that another shard holds."""
        return (position // self.shard_tokens + 1) * self.shard_tokens
