"""The pages of all groups: which are free, and who holds the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import LISTED_PER_PAGE, pages_for
from mnemosyne.cache.table import PageTable


class Ledger:
    """Hands pages out to holders, which are request ids, and takes them back.

    A holder names no page: it gets a table, and gives back all that the ledger has noted for it.
    So no page is freed twice, and none is free while a holder has it.

    Args:
        num_pages: of each group.
        page_size: tokens per page.
        max_tokens_per_group: tokens of one request that a group holds at most; a multiple of
            ``page_size``.
    """

    def __init__(
        self, num_pages: Sequence[int], *, page_size: int, max_tokens_per_group: int
    ) -> None:
        assert max_tokens_per_group % page_size == 0, "a shard ends with a page"
        self.group_pages = tuple(num_pages)
        self.page_size = page_size
        self.max_tokens_per_group = max_tokens_per_group
        self.reset()

    def reset(self) -> None:
        """Take every page back, whoever holds it."""
        self._allocators = [PageAllocator(count) for count in self.group_pages]
        self._listed = [0] * len(self.group_pages)  # pages in tables, shared ones each time
        self._tables: dict[int, PageTable] = {}  # by holder

    @property
    def groups(self) -> range:
        return range(len(self.group_pages))

    @property
    def num_pages(self) -> int:
        """Pages of all groups."""
        return sum(self.group_pages)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - sum(self.num_free(group) for group in self.groups)

    def num_free(self, group: int) -> int:
        """Pages of a group that can be had."""
        return self._allocators[group].num_free

    def num_listable(self, group: int) -> int:
        """Pages that tables may list beyond those that they do."""
        return LISTED_PER_PAGE * self.group_pages[group] - self._listed[group]

    def max_free_tokens(self) -> int:
        """Tokens that the free pages of one group hold at most."""
        return max(self.num_free(group) for group in self.groups) * self.page_size

    def max_request_tokens(self) -> int:
        """Tokens of the longest request that the empty cache holds."""
        rooms = (count * self.page_size for count in self.group_pages)
        shards = sorted((min(room, self.max_tokens_per_group) for room in rooms), reverse=True)
        # only full shards can be followed by another one
        full = sum(1 for shard in shards if shard == self.max_tokens_per_group)
        return full * self.max_tokens_per_group + sum(shards[full : full + 1])

    def bound_by(self) -> str:
        """The key that bounds the longest request."""
        rooms = (count * self.page_size for count in self.group_pages)
        is_cut = all(room > self.max_tokens_per_group for room in rooms)
        return "cache.max_tokens_per_group" if is_cut else "cache.max_tokens"

    def shard_pages(self, num_tokens: int) -> list[int]:
        """Pages of each shard of a request, in the order of positions."""
        full, rest = divmod(num_tokens, self.max_tokens_per_group)
        sizes = [self.max_tokens_per_group // self.page_size] * full
        if rest:
            sizes.append(pages_for(rest, self.page_size))
        return sizes

    def reserve(self, holder: int, groups: Sequence[int], num_tokens: int) -> PageTable:
        """Take pages for the whole life of a request.

        Args:
            holder: who has no pages yet.
            groups: of each shard, with as many free pages as it takes.
            num_tokens: prompt and output together.

        Returns:
            Where its keys will lie.
        """
        assert holder not in self._tables, f"{holder} has pages"
        sizes = zip(groups, self.shard_pages(num_tokens), strict=True)
        parts = [(group, self._take(group, size)) for group, size in sizes]
        table = self._tables[holder] = PageTable.spread(parts, self.max_tokens_per_group)
        return table

    def release(self, holder: int) -> None:
        """Take back whatever a holder has."""
        for extent in self._tables.pop(holder).extents:
            self._listed[extent.group] -= len(extent.pages)
            self._allocators[extent.group].release(extent.pages)

    def _take(self, group: int, count: int) -> np.ndarray:
        """Free pages, which are that no more."""
        pages = self._allocators[group].allocate(count)
        assert pages is not None, "the pages were free a moment ago"
        self._listed[group] += count
        return pages
