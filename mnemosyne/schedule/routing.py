"""Which groups hold the cache of a request. Groups are replicas for all but the longest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import Placement, Shard, pages_for

NOTHING: Mapping[int, int] = MappingProxyType({})


class Router:
    """Places requests on groups, all pages or none.

    A request takes as many groups as its tokens need; the groups with the least pending prefill
    come first, and among equals those with the fewest pages in use. Pages for its whole life are
    reserved at once, because growth that waits for pages could deadlock. Prefill work is counted
    as prompt length squared less the part done.

    Args:
        allocators: the pages of each group.
        page_size: tokens per page.
        max_tokens_per_group: tokens of one request that a group holds at most; a multiple of
            ``page_size``.
    """

    def __init__(
        self, allocators: Sequence[PageAllocator], *, page_size: int, max_tokens_per_group: int
    ) -> None:
        assert max_tokens_per_group % page_size == 0, "a shard ends with a page"
        self.allocators = tuple(allocators)
        self.page_size = page_size
        self.max_tokens_per_group = max_tokens_per_group
        self._pending = [0] * len(self.allocators)  # prefill work ahead of each group

    @property
    def num_pages(self) -> int:
        return sum(allocator.num_pages for allocator in self.allocators)

    @property
    def num_used(self) -> int:
        return sum(allocator.num_used for allocator in self.allocators)

    def max_free_tokens(self) -> int:
        """Tokens that the free pages of one group hold at most."""
        return max(allocator.num_free for allocator in self.allocators) * self.page_size

    def max_request_tokens(self) -> int:
        """Tokens of the longest request that the empty cache holds."""
        rooms = (allocator.num_pages * self.page_size for allocator in self.allocators)
        shards = sorted((min(room, self.max_tokens_per_group) for room in rooms), reverse=True)
        # only full shards can be followed by another one
        full = sum(1 for shard in shards if shard == self.max_tokens_per_group)
        return full * self.max_tokens_per_group + sum(shards[full : full + 1])

    def bound_by(self) -> str:
        """The key that bounds the longest request."""
        rooms = (allocator.num_pages * self.page_size for allocator in self.allocators)
        is_cut = all(room > self.max_tokens_per_group for room in rooms)
        return "cache.max_tokens_per_group" if is_cut else "cache.max_tokens"

    def place(
        self,
        num_tokens: int,
        num_prompt_tokens: int,
        *,
        kept: Mapping[int, int] = NOTHING,
    ) -> Placement | None:
        """Reserve pages for a request.

        Args:
            num_tokens: prompt and output together.
            num_prompt_tokens: of which so many will be prefilled.
            kept: pages of some groups that are free but not for this request.

        Returns:
            None if the pages are not free now.
        """
        sizes = self._shard_pages(num_tokens)
        free = [allocator.num_free for allocator in self.allocators]
        if kept:
            for group, pages in kept.items():
                free[group] -= pages
        chosen = _assign(sizes, self._least_pending(), free)
        if chosen is None:
            return None
        shards = []
        for group, size in zip(chosen, sizes, strict=True):
            taken = self.allocators[group].allocate(size)
            assert taken is not None, "the pages were free a moment ago"
            shards.append(Shard(group, taken))
        placement = Placement(tuple(shards), self.max_tokens_per_group)
        self._change_pending(placement, num_prompt_tokens**2)
        return placement

    def _least_pending(self) -> Sequence[int]:
        """Groups, that with the least prefill ahead of it first."""
        groups = range(len(self.allocators))
        if len(groups) == 1:
            return groups
        return sorted(groups, key=lambda g: (self._pending[g], self.allocators[g].num_used))

    def has_room(self, num_tokens: int) -> bool:
        """Whether a request would be placed now."""
        free = [allocator.num_free for allocator in self.allocators]
        return _assign(self._shard_pages(num_tokens), range(len(free)), free) is not None

    def best_groups(self, num_tokens: int) -> dict[int, int]:
        """Pages by group of a request that the empty cache would hold, where most are free now."""
        capacity = [allocator.num_pages for allocator in self.allocators]
        order = sorted(range(len(capacity)), key=lambda group: -self.allocators[group].num_free)
        sizes = self._shard_pages(num_tokens)
        chosen = _assign(sizes, order, capacity)
        assert chosen is not None, "a request that never fits is refused"
        return dict(zip(chosen, sizes, strict=True))

    def advance(self, placement: Placement, start: int, stop: int) -> None:
        """Take note that a request was prefilled from position ``start`` to ``stop``."""
        for shard in placement.shards:
            self._pending[shard.group] += start**2 - stop**2

    def release(self, placement: Placement, num_prompt_tokens: int, num_done: int) -> None:
        """Give the pages of a request back, of whose prompt ``num_done`` tokens were prefilled."""
        self._change_pending(placement, num_done**2 - num_prompt_tokens**2)
        for shard in placement.shards:
            self.allocators[shard.group].release(shard.pages)

    def reset(self) -> None:
        """Take every page back, whoever holds it."""
        self.allocators = tuple(PageAllocator(a.num_pages) for a in self.allocators)
        self._pending = [0] * len(self.allocators)

    def _shard_pages(self, num_tokens: int) -> list[int]:
        full, rest = divmod(num_tokens, self.max_tokens_per_group)
        sizes = [self.max_tokens_per_group // self.page_size] * full
        if rest:
            sizes.append(pages_for(rest, self.page_size))
        return sizes

    def _change_pending(self, placement: Placement, amount: int) -> None:
        for shard in placement.shards:
            self._pending[shard.group] += amount


def _assign(sizes: list[int], order: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """A group of its own for each shard, the first in ``order`` that has room, or None."""
    chosen: list[int] = []
    for size in sizes:
        for group in order:
            if room[group] >= size and group not in chosen:
                chosen.append(group)
                break
        else:
            return None
    return chosen
