"""The pages of all groups: which are free, who holds the others, and which hold known prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.chain import Chain
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import LISTED_PER_PAGE, pages_for
from mnemosyne.cache.prefix import NO_PAGES, Nearest, PrefixIndex
from mnemosyne.cache.room import Room
from mnemosyne.cache.table import Extent, PageTable


class Place(NamedTuple):
    """Where a shard of a request will lie."""

    group: int
    shared: np.ndarray = NO_PAGES  # int64, known pages that hold its first keys


class Ledger(Room):
    """Hands pages out to holders, which are request ids, and takes them back.

    A holder names no page: it gets a table, and gives back all that the ledger has noted for it.
    So no page is freed twice, and none is free while a holder has it. Where prefixes are shared,
    full pages that were computed become known: others may hold them too, and they stay when nobody
    does until their place is needed.

    Args:
        num_pages: of each group.
        page_size: tokens per page.
        max_tokens_per_group: tokens of one request that a group holds at most; a multiple of
            ``page_size``.
        shares: whether prefixes are shared.
        kinds: of layers; None: each keeps every key.
    """

    def __init__(
        self,
        num_pages: Sequence[int],
        *,
        page_size: int,
        max_tokens_per_group: int,
        shares: bool = False,
        kinds: PageKinds | None = None,
    ) -> None:
        super().__init__(num_pages, kinds or PageKinds(page_size), max_tokens_per_group)
        self.shares = shares
        self.reset()

    def reset(self) -> None:
        """Take every page back, whoever holds it, and know none of them."""
        self._allocators = [PageAllocator(count) for count in self.group_pages]
        self._indexes = [
            PrefixIndex(count, self.page_size) for count in self.group_pages if self.shares
        ]
        self._listed = [0] * len(self.group_pages)  # pages in tables, shared ones each time
        self._tables: dict[int, PageTable] = {}  # by holder
        self._grown: set[int] = set()  # holders whose pages are not in the order of their ids
        self._known: dict[int, int] = {}  # of each holder, pages from the first on that are known

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - sum(self.num_free(group) for group in self.groups)

    @property
    def num_lent(self) -> int:
        """Pages of copies that groups hold for prompts of others."""
        return sum(len(copy.pages) for table in self._tables.values() for copy in table.lent)

    @property
    def num_idle(self) -> int:
        """Pages of known prefixes that nobody holds."""
        return sum(index.num_idle for index in self._indexes)

    def num_free(self, group: int) -> int:
        """Pages of a group that can be had, those of known prefixes that nobody holds included."""
        num_idle = self._indexes[group].num_idle if self.shares else 0
        return self._allocators[group].num_free + num_idle

    def num_listable(self, group: int) -> int:
        """Pages that tables may list beyond those that they do."""
        return LISTED_PER_PAGE * self.group_pages[group] - self._listed[group]

    def max_free_tokens(self) -> int:
        """Tokens that the free pages of one group hold at most."""
        return self.kinds.most_tokens(max(self.num_free(group) for group in self.groups))

    def table_of(self, holder: int) -> PageTable:
        """Where the keys of a holder lie."""
        return self._tables[holder]

    def unused(self, group: int) -> np.ndarray:
        """Pages of a group that nobody holds and that hold no known prefix, int64."""
        is_used = np.zeros(self.group_pages[group], dtype=bool)
        for table in self._tables.values():
            is_used[table.pages_on(group)] = True
            for ring in table.rings_on(group):
                is_used[ring] = True
        if self.shares:
            is_used |= self._indexes[group].is_known
        return np.flatnonzero(~is_used)

    def num_holders(self, group: int, page: int) -> int | None:
        """How many hold a page, where that is counted: of pages that others may hold too."""
        return self._indexes[group].num_holders(page)

    def num_known(self, holder: int) -> int:
        """Pages of a holder, from the first on, that others may hold as well."""
        return self._known[holder]

    def count(self, group: int, chain: Chain, first: int, stop: int) -> int:
        """How many ``match`` would find, were there no collisions."""
        return self._indexes[group].count(chain, first, stop)

    def match(self, group: int, chain: Chain, first: int, stop: int) -> np.ndarray:
        """Known pages of a group that hold a part of a chain (see ``PrefixIndex.match``)."""
        return self._indexes[group].match(chain, first, stop)

    def find(self, digest: bytes, near: int = 0) -> tuple[int, int] | None:
        """Group and id of a known page by its digest, on the group ``near`` if it is there."""
        for group in (near, *self.groups):
            page = self._indexes[group].page_of(digest)
            if page is not None:
                return group, page
        return None

    def num_held(self, place: Place) -> int:
        """Pages of a place that somebody holds, and that are not taken from the free ones."""
        return self._indexes[place.group].num_held(place.shared) if len(place.shared) else 0

    def nearest(self, group: int, chain: Chain, page: int) -> Nearest | None:
        """A cached page of a group in place of a page of a chain (see ``PrefixIndex.nearest``)."""
        return self._indexes[group].nearest(chain, page)

    def reserve(self, holder: int, places: Sequence[Place], num_tokens: int) -> PageTable:
        """Take pages for the whole life of a request.

        Args:
            holder: who has no pages yet.
            places: of its shards, with as many free pages as they take.
            num_tokens: prompt and output together.

        Returns:
            Where its keys will lie.
        """
        assert holder not in self._tables, f"{holder} has pages"
        sizes = self.shard_pages(num_tokens) if self.kinds.keeps else [0]
        shards = zip(places, sizes, strict=True)
        parts = [(place.group, self._take(place, size)) for place, size in shards]
        table = PageTable.spread(parts, self.max_tokens_per_group)
        if self.kinds.windows:
            rings = zip(self.kinds.windows, self.kinds.rings(num_tokens), strict=True)
            home = places[0].group
            taken = [self._take_ring(home, window.tracks, count) for window, count in rings]
            table = replace(table, rings=tuple(taken))
        self._tables[holder] = table
        if self.shares:
            self._known[holder] = sum(len(place.shared) for place in places)
        return table

    def has_room(self, table: PageTable, position: int) -> bool:
        """Return whether a table has a place for one more position."""
        last, page = table.extents[-1], position // self.page_size
        rings = zip(self.kinds.windows, table.rings, strict=True)
        is_kept = not self.kinds.keeps or page < last.start // self.page_size + len(last.pages)
        return is_kept and all(
            page < ring.shape[1] or ring.shape[1] == self.kinds.ring(window)
            for window, ring in rings
        )

    def grow(self, holder: int) -> PageTable | None:
        """Take room for one page more, where the last keys lie or else on another group.

        Returns:
            The table from now on; None if no page is free there.
        """
        table, home = self._tables[holder], self._tables[holder].reporter
        short = [
            window.tracks * (ring.shape[1] < self.kinds.ring(window))
            for window, ring in zip(self.kinds.windows, table.rings, strict=True)
        ]
        if any(short) and sum(short) > self.num_free(home) - self.kinds.keeps:
            return None
        if self.kinds.keeps:
            grown = self._grow_last(holder)
            if grown is None:
                return None
            table = grown
        if any(short):
            rings = zip(table.rings, short, strict=True)
            taken = [_widened(ring, self._take_ring(home, n, 1)) for ring, n in rings]
            table = replace(table, rings=tuple(taken))
        self._tables[holder] = table
        self._grown.add(holder)
        return table

    def _grow_last(self, holder: int) -> PageTable | None:
        """Take one page more of layers that keep every key."""
        table, last = self._tables[holder], self._tables[holder].extents[-1]
        group, start, before = last.group, last.start, last.pages
        others = list(table.extents[:-1])
        if len(before) * self.page_size == self.max_tokens_per_group:
            used = {extent.group for extent in table.extents}
            left = [g for g in self.groups if g not in used]
            if not left:
                return None
            others.append(last)
            group, start = max(left, key=self.num_free), start + self.max_tokens_per_group
            before = NO_PAGES
        if min(self.num_free(group), self.num_listable(group)) < 1:
            return None
        pages = np.concatenate([before, self._take(Place(group), 1)])
        return replace(table, extents=(*others, Extent(group, start, pages)))

    def can_lend(self, group: int, num_tokens: int) -> bool:
        """Return whether a group has pages for a copy of so many keys."""
        count = pages_for(num_tokens, self.page_size)
        return min(self.num_free(group), self.num_listable(group)) >= count

    def lend(self, holder: int, groups: Sequence[int], num_tokens: int) -> PageTable:
        """Take pages on other groups for copies of a holder's first keys; the table from now on.

        Args:
            holder: whose pages are on one group.
            groups: others, which ``can_lend``.
            num_tokens: keys that a copy holds.
        """
        table, count = self._tables[holder], pages_for(num_tokens, self.page_size)
        assert len(table.extents) == 1, "what several groups hold is not lent to"
        copies = tuple(Extent(group, 0, self._take(Place(group), count)) for group in groups)
        self._tables[holder] = replace(table, lent=copies)
        return self._tables[holder]

    def take_back(self, holder: int) -> PageTable:
        """Take back the pages that were lent to a holder; the table from now on."""
        table = self._tables[holder]
        for extent in table.lent:
            self._free(extent)
        self._tables[holder] = replace(table, lent=())
        return self._tables[holder]

    def release(self, holder: int, chain: Chain | None = None, num_computed: int = 0) -> None:
        """Take back whatever a holder has.

        Args:
            holder: who has pages.
            chain: its tokens, if its pages may be shared.
            num_computed: positions whose keys and values are whole.
        """
        if chain is not None:
            self._keep(holder, chain, num_computed // self.page_size)
        self._known.pop(holder, None)
        table = self._tables.pop(holder)
        for ring in table.rings:
            self._allocators[table.reporter].release(np.sort(ring, axis=None))
        for extent in table.lanes:
            self._free(extent, is_sorted=holder not in self._grown)
        self._grown.discard(holder)

    def publish(self, holder: int, chain: Chain, num_computed: int) -> None:
        """Make the full pages of a holder known, as far as no other pages hold the same.

        Args:
            holder: who has pages.
            chain: its tokens.
            num_computed: positions whose keys and values are whole.
        """
        known, stop = self._known[holder], num_computed // self.page_size
        while known < stop:
            extent, offset, end = self._extent_at(holder, known)
            index = self._indexes[extent.group]
            before = int(extent.pages[known - offset - 1]) if known > offset else None
            pages = extent.pages[known - offset : min(end, stop) - offset]
            count = index.add(chain, known, pages, before)
            self._known[holder] = known = known + count
            if count < len(pages):
                return

    def clear(self) -> None:
        """Know no prefix any more; who holds pages keeps them."""
        for index, allocator in zip(self._indexes, self._allocators, strict=False):
            allocator.release(index.clear())

    def _free(self, extent: Extent, *, is_sorted: bool = True) -> None:
        pages = extent.pages
        self._listed[extent.group] -= len(pages)
        if self.shares:
            pages = self._indexes[extent.group].let_go(pages)
        if self.shares or not is_sorted:
            pages = np.sort(pages)
        self._allocators[extent.group].release(pages)

    def _keep(self, holder: int, chain: Chain, stop: int) -> None:
        """Make the last pages of a holder known as well, behind equal ones of others."""
        page = self._known[holder]
        while page < stop:
            extent, offset, end = self._extent_at(holder, page)
            index = self._indexes[extent.group]
            before = index.page_of(chain.digests[page - 1]) if page > offset else None
            if page > offset and before is None:
                return
            if index.page_of(chain.digests[page]) is not None:
                page += 1
                continue
            pages = extent.pages[page - offset : min(end, stop) - offset]
            page += index.add(chain, page, pages, before)

    def _extent_at(self, holder: int, page: int) -> tuple[Extent, int, int]:
        """The extent with a page of a holder, its first page, and the page after its last."""
        table, position = self._tables[holder], page * self.page_size
        extent = table.storing(position)
        offset = extent.start // self.page_size
        end = table.next_start(position) // self.page_size
        return extent, offset, min(end, offset + len(extent.pages))

    def _take_ring(self, group: int, num_tracks: int, count: int) -> np.ndarray:
        """Free pages of layers that forget, int64 ``[tracks, count]``."""
        tracks = [self._take(Place(group), count) for _ in range(num_tracks)]
        self._listed[group] -= num_tracks * count  # among those of their kind
        return np.stack(tracks) if tracks else np.empty((0, count), dtype=np.int64)

    def _take(self, place: Place, count: int) -> np.ndarray:
        """Known pages and free ones, together so many, which are not free any more."""
        group, shared = place
        self._listed[group] += count
        allocator, count = self._allocators[group], count - len(shared)
        if self.shares:
            index = self._indexes[group]
            index.hold(shared)
            lack = count - allocator.num_free
            if lack > 0:
                allocator.release(np.sort(index.evict(lack)))
        pages = allocator.allocate(count)
        assert pages is not None, "the pages were free a moment ago"
        return np.concatenate([shared, pages]) if len(shared) else pages


def _widened(ring: np.ndarray, more: np.ndarray) -> np.ndarray:
    """A ring with one more page in each track; nothing has gone round in it yet."""
    return np.concatenate([ring, more], axis=1) if len(more) else ring
