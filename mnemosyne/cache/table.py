"""The places of a request's keys: a table of extents, and every role that follows from it.

A table is a value: one that changes is another table, which takes the place of the last one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

FAR = 2**62  # beyond every position


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Neighbouring positions of a request on one group."""

    group: int
    start: int  # position of the first key
    pages: np.ndarray  # int64, in key order


class Held(NamedTuple):
    """The keys of one extent that exist so far."""

    extent: Extent
    positions: range


@dataclass(frozen=True, slots=True, eq=False)
class PageTable:
    """Extents by start, at most one on each group; the first one starts at 0.

    A position belongs to the last extent that starts at or before it. Extents may overlap: what
    one holds beyond the start of the next is a copy that nobody reads.

    The group to which a position belongs *stores* its key and value. Every group that *holds* a
    key computes the rows that see it. One of them, the *reporter*, speaks for the request.

    While a prompt is computed, other groups may lend pages for copies of all its keys. They take no
    part in these roles: a slice of a chunk that one group alone computes has its ``lane`` instead.

    Layers with a window keep what they see on the reporter alone, however long the request is.

    Args:
        extents: of the layers that keep every key; without pages if there are none.
        lent: copies of all keys of a lone extent, each on another group.
        rings: of each kind of layers that forgets (see ``kinds``), int64 ``[tracks, pages]``.
    """

    extents: tuple[Extent, ...]
    lent: tuple[Extent, ...] = ()
    rings: tuple[np.ndarray, ...] = ()

    @classmethod
    def on(cls, group: int, pages: np.ndarray) -> Self:
        """All keys on one group.

        Args:
            group: that holds them.
            pages: int64, in key order.
        """
        return cls((Extent(group, 0, pages),))

    @classmethod
    def spread(cls, parts: Iterable[tuple[int, np.ndarray]], tokens_each: int) -> Self:
        """Equal shards: each group but the last holds ``tokens_each`` positions.

        Args:
            parts: groups and their pages, in the order of positions.
            tokens_each: positions of a shard.
        """
        numbered = enumerate(parts)
        return cls(tuple([Extent(g, index * tokens_each, pages) for index, (g, pages) in numbered]))

    def lane(self, group: int | None) -> PageTable:
        """The table as the rows of one chunk see it.

        Args:
            group: that computes them alone, over its extent or copy; None: the roles decide.
        """
        if group is None:
            return self
        (extent,) = (extent for extent in self.lanes if extent.group == group)
        return PageTable((extent,))

    @property
    def lanes(self) -> tuple[Extent, ...]:
        """The extents whose groups may compute slices: its own, one then, and lent copies."""
        return self.extents + self.lent

    @property
    def reporter(self) -> int:
        """The group that samples and owns the rows: it holds the first key, so it has them all."""
        return self.extents[0].group

    def num_holding(self, stop: int) -> int:
        """Extents that hold a key once the positions below ``stop`` are computed."""
        return sum([extent.start < stop for extent in self.extents])

    def holding(self, stop: int) -> list[Held]:
        """Extents that hold a key once the positions below ``stop`` are computed, in order."""
        return [
            Held(self.extents[index], self.positions(index, stop))
            for index in range(self.num_holding(stop))
        ]

    def storing(self, position: int) -> Extent:
        """The extent to which a position belongs."""
        return self.extents[self.num_holding(position + 1) - 1]

    def next_start(self, position: int) -> int:
        """The first position after ``position`` that belongs to another extent, or ``FAR``."""
        index = self.num_holding(position + 1)
        return self.extents[index].start if index < len(self.extents) else FAR

    def positions(self, index: int, stop: int) -> range:
        """Positions below ``stop`` that belong to an extent."""
        start = self.extents[index].start
        if index + 1 < len(self.extents):
            stop = min(stop, self.extents[index + 1].start)
        return range(start, max(start, stop))

    def held_by(self, group: int, stop: int) -> Held | None:
        """The part that a group holds once the positions below ``stop`` are computed, or None."""
        for index, extent in enumerate(self.extents):
            if extent.group == group:
                held = Held(extent, self.positions(index, stop))
                return held if held.positions else None
        return None

    def pages_on(self, group: int) -> np.ndarray:
        """All pages on one group of layers that keep every key, int64, in key order."""
        parts = [extent.pages for extent in self.lanes if extent.group == group]
        return parts[0] if parts else np.empty(0, dtype=np.int64)

    def rings_on(self, group: int) -> tuple[np.ndarray, ...]:
        """The pages of layers that forget, if one group has them; see ``rings``."""
        return self.rings if self.rings and group == self.reporter else ()
