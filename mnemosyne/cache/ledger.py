"""The pages of all groups: who holds which, and which hold known prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.prefix import NO_PAGES, Nearest
from mnemosyne.cache.stock import Place, Stock
from mnemosyne.cache.table import Extent, PageTable


class Ledger(Stock):
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
        kinds = kinds or PageKinds(page_size)
        super().__init__(num_pages, kinds, max_tokens_per_group, shares=shares)

    def reset(self) -> None:
        """Take every page back, whoever holds it, and know none of them."""
        super().reset()
        self._tables: dict[int, PageTable] = {}  # by holder
        self._grown: set[int] = set()  # holders whose pages are not in the order of their ids
        self._known: dict[int, int] = {}  # of each holder, pages from the first on that are known

    @property
    def num_lent(self) -> int:
        """Pages of copies that groups hold for prompts of others."""
        return sum(len(copy.pages) for table in self._tables.values() for copy in table.lent)

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
        if self._ends:
            is_used[self._ends[group].all_pages()] = True
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

    def last_end(self, group: int, chain: Chain, stop: int) -> int:
        """Pages of a chain, at most ``stop``, after which a request of a group can start."""
        return self._ends[group].last(chain, stop) if self._ends else stop

    def num_shared(self, places: Sequence[Place]) -> int:
        """Pages of a request that need not be computed in some places."""
        if self._ends:
            return places[0].num_ended
        return sum(len(place.shared) for place in places)

    def num_held(self, place: Place) -> int:
        """Pages of a place that somebody holds, and that are not taken from the free ones."""
        return self._indexes[place.group].num_held(place.shared) if len(place.shared) else 0

    def nearest(self, group: int, chain: Chain, page: int) -> Nearest | None:
        """A cached page of a group in place of a page of a chain (see ``PrefixIndex.nearest``)."""
        return self._indexes[group].nearest(chain, page)

    def reserve(
        self,
        holder: int,
        places: Sequence[Place],
        num_tokens: int,
        chain: Chain | None = None,
    ) -> PageTable:
        """Take pages for the whole life of a request.

        Args:
            holder: who has no pages yet.
            places: of its shards, with as many free pages as they take.
            num_tokens: prompt and output together.
            chain: its tokens, if prefixes are shared.

        Returns:
            Where its keys will lie.
        """
        assert holder not in self._tables, f"{holder} has pages"
        seen, sizes = self._window_of(places[0], chain), self.shard_sizes(num_tokens)
        shards = zip(places, sizes, strict=True)
        parts = [(place.group, self._take(place, size)) for place, size in shards]
        table = PageTable.spread(parts, self.max_tokens_per_group)
        if self.kinds.windows:
            table = replace(table, rings=self._take_rings(places[0], num_tokens, seen))
        self._tables[holder] = table
        if self.shares:
            self._known[holder] = sum(len(place.shared) for place in places)
        return table

    def keep_end(self, holder: int, chain: Chain, num_pages: int) -> None:
        """Let others start after the first pages of a holder, if there is room for its windows.

        Args:
            holder: that computed those pages, and at most one more.
            chain: its tokens.
            num_pages: how many.
        """
        self._copy_end(self._tables[holder], chain, num_pages)

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

    def release(
        self,
        holder: int,
        chain: Chain | None = None,
        num_computed: int = 0,
        *,
        is_whole: bool = True,
    ) -> None:
        """Take back whatever a holder has.

        Args:
            holder: who has pages.
            chain: its tokens, if its pages may be shared.
            num_computed: positions whose keys and values are whole.
            is_whole: whether it computed no others since.
        """
        if chain is not None:
            self._keep(holder, chain, num_computed // self.page_size)
        self._known.pop(holder, None)
        table = self._tables.pop(holder)
        if table.rings:
            ended = chain if is_whole else None
            self._free_rings(table, ended, num_computed // self.page_size)
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
        while known < stop and self.kinds.keeps:
            extent, offset, end = self._extent_at(holder, known)
            index = self._indexes[extent.group]
            before = int(extent.pages[known - offset - 1]) if known > offset else None
            pages = extent.pages[known - offset : min(end, stop) - offset]
            count = index.add(chain, known, pages, before)
            self._known[holder] = known = known + count
            if count < len(pages):
                return

    def _keep(self, holder: int, chain: Chain, stop: int) -> None:
        """Make the last pages of a holder known as well, behind equal ones of others."""
        page = self._known[holder]
        while page < stop and self.kinds.keeps:
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


def _widened(ring: np.ndarray, more: np.ndarray) -> np.ndarray:
    """A ring with one more page in each track; nothing has gone round in it yet."""
    return np.concatenate([ring, more], axis=1) if len(more) else ring
