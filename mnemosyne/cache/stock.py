"""The pages of all groups: which are free, and which hold known prefixes that nobody holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.chain import Chain
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import LISTED_PER_PAGE
from mnemosyne.cache.prefix import NO_PAGES, PrefixIndex
from mnemosyne.cache.room import Room
from mnemosyne.cache.table import Extent, PageTable
from mnemosyne.cache.windows import Ends, Moved, Rings, flat, parts_of

EVICTED = 32  # pages of one chain that go at a time, while windows may be older


class Place(NamedTuple):
    """Where a shard of a request will lie."""

    group: int
    shared: np.ndarray = NO_PAGES  # int64, known pages that hold its first keys
    num_ended: int = 0  # of a first shard: pages of the request after which windows are kept here


class Stock(Room):
    """Gives pages away and takes them back; who has them is for the ledger to know.

    Args:
        num_pages: of each group.
        kinds: of layers.
        max_tokens_per_group: tokens of one request that a group holds at most; whole pages.
        shares: whether prefixes are shared.
    """

    def __init__(
        self,
        num_pages: Sequence[int],
        kinds: PageKinds,
        max_tokens_per_group: int,
        *,
        shares: bool,
    ) -> None:
        super().__init__(num_pages, kinds, max_tokens_per_group)
        self.shares = shares
        self.reset()

    def reset(self) -> None:
        """Take every page back, and know none of them."""
        self._allocators = [PageAllocator(count) for count in self.group_pages]
        self._indexes = [
            PrefixIndex(count, self.page_size) for count in self.group_pages if self.shares
        ]
        self._ends = [Ends(self.page_size) for _ in self._indexes if self.kinds.windows]
        self._moved: list[Moved] = []  # that no plan told of yet
        self._listed = [0] * len(self.group_pages)  # pages in tables, shared ones each time

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - sum(self.num_free(group) for group in self.groups)

    @property
    def num_idle(self) -> int:
        """Pages of known prefixes that nobody holds."""
        return sum(each.num_idle for each in self._indexes) + sum(e.num_pages for e in self._ends)

    def num_free(self, group: int) -> int:
        """Pages of a group that can be had, those of known prefixes that nobody holds included."""
        num_idle = self._indexes[group].num_idle if self.shares else 0
        num_ended = self._ends[group].num_pages if self._ends else 0
        return self._allocators[group].num_free + num_idle + num_ended

    def num_listable(self, group: int) -> int:
        """Pages that tables may list beyond those that they do."""
        return LISTED_PER_PAGE * self.group_pages[group] - self._listed[group]

    def max_free_tokens(self) -> int:
        """Tokens that the free pages of one group hold at most."""
        return self.kinds.most_tokens(max(self.num_free(group) for group in self.groups))

    def clear(self) -> None:
        """Know no prefix any more; who holds pages keeps them."""
        for index, allocator in zip(self._indexes, self._allocators, strict=False):
            allocator.release(index.clear())
        for ends, allocator in zip(self._ends, self._allocators, strict=False):
            while ends.num_pages:
                allocator.release(ends.evict())

    def take_moved(self) -> tuple[Moved, ...]:
        """Pages to copy before the next step, in this order; they are not told again."""
        moved, self._moved = tuple(self._moved), []
        return moved

    def _free(self, extent: Extent, *, is_sorted: bool = True) -> None:
        pages = extent.pages
        self._listed[extent.group] -= len(pages)
        if self.shares:
            pages = self._indexes[extent.group].let_go(pages)
        if self.shares or not is_sorted:
            pages = np.sort(pages)
        self._allocators[extent.group].release(pages)

    def _window_of(self, place: Place, chain: Chain | None) -> Rings:
        """The pages of layers that forget that the first token of a request will see."""
        if not place.num_ended or chain is None:
            return ()
        now = self._indexes[place.group].now
        return self._ends[place.group].use(chain, place.num_ended, now)

    def _take_rings(self, place: Place, num_tokens: int, seen: Rings) -> Rings:
        """Free pages for the rings of a request, and what its first token sees moved to them.

        Args:
            place: of its first shard.
            num_tokens: of the request.
            seen: what its first token sees. Others may have those pages by now, but nobody has
                written to them.
        """
        counts = zip(self.kinds.windows, self.kinds.rings(num_tokens), strict=True)
        rings = tuple(self._take_ring(place.group, w.tracks, count) for w, count in counts)
        if seen:
            self._move(place.group, seen, parts_of(self.kinds, rings, place.num_ended))
        return rings

    def _move(self, group: int, sources: Rings, targets: Rings) -> None:
        ids = [np.concatenate([part.ravel() for part in parts]) for parts in (sources, targets)]
        self._moved.append(Moved(group, *ids))

    def _free_rings(self, table: PageTable, chain: Chain | None, num_pages: int) -> None:
        """Take the rings of a request back, but keep what the token after its last page sees."""
        group, kept = table.reporter, NO_PAGES
        if chain is not None and self._can_end(group, chain, num_pages):
            parts = parts_of(self.kinds, table.rings, num_pages)
            self._ends[group].add(chain, num_pages, parts, self._indexes[group].now)
            kept = flat(parts)
        pages = flat(table.rings)
        self._allocators[group].release(pages[~np.isin(pages, kept)])

    def _can_end(self, group: int, chain: Chain, num_pages: int) -> bool:
        """Return whether windows after a prefix may be kept, and are not yet."""
        return bool(self._ends) and num_pages > 0 and not self._ends[group].has(chain, num_pages)

    def _copy_end(self, table: PageTable, chain: Chain, num_pages: int) -> None:
        """Keep what the token after so many pages sees, in pages that nobody holds."""
        group = table.reporter
        if not self._can_end(group, chain, num_pages):
            return
        sources = parts_of(self.kinds, table.rings, num_pages)
        if sum(part.size for part in sources) > self.num_free(group):
            return
        taken = tuple(self._take_ring(group, len(part), part.shape[1]) for part in sources)
        self._move(group, sources, taken)
        self._ends[group].add(chain, num_pages, taken, self._indexes[group].now)

    def _take_ring(self, group: int, num_tracks: int, count: int) -> np.ndarray:
        """Free pages of layers that forget, int64 ``[tracks, count]``."""
        tracks = [self._take(Place(group), count) for _ in range(num_tracks)]
        self._listed[group] -= num_tracks * count  # among those of their kind
        return np.stack(tracks) if tracks else np.empty((0, count), dtype=np.int64)

    def _take(self, place: Place, count: int) -> np.ndarray:
        """Known pages and free ones, together so many, which are not free any more."""
        group, shared, _ = place
        self._listed[group] += count
        allocator, count = self._allocators[group], count - len(shared)
        if self.shares:
            index = self._indexes[group]
            index.hold(shared)
            self._evict(group, count)
        pages = allocator.allocate(count)
        assert pages is not None, "the pages were free a moment ago"
        return np.concatenate([shared, pages]) if len(shared) else pages

    def _evict(self, group: int, count: int) -> None:
        """Have so many pages free, of those that were of use longest ago."""
        allocator, index = self._allocators[group], self._indexes[group]
        while (lack := count - allocator.num_free) > 0:
            if self._ends and self._ends[group].oldest <= index.oldest:
                allocator.release(self._ends[group].evict())
            else:
                most = min(lack, index.num_idle, EVICTED if self._ends else lack)
                allocator.release(np.sort(index.evict(most)))
