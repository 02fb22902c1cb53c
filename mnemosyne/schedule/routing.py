"""Which groups hold the cache of a request. Groups are replicas for all but the longest ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import Placement, Shard, pages_for
from mnemosyne.schedule.prefill import Running


class Router:
    """Places requests on groups, all pages or none.

    A request takes as many groups as its tokens need; the groups with the least pending prefill
    come first, and among equals those with the fewest pages in use. Pages for its whole life are
    reserved at once, because growth that waits for pages could deadlock.

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

    @property
    def num_pages(self) -> int:
        return sum(allocator.num_pages for allocator in self.allocators)

    @property
    def num_used(self) -> int:
        return sum(allocator.num_used for allocator in self.allocators)

    def max_request_tokens(self) -> int:
        """Tokens of the longest request that the empty cache holds."""
        rooms = (allocator.num_pages * self.page_size for allocator in self.allocators)
        shards = sorted((min(room, self.max_tokens_per_group) for room in rooms), reverse=True)
        # only full shards can be followed by another one
        full = sum(1 for shard in shards if shard == self.max_tokens_per_group)
        return full * self.max_tokens_per_group + sum(shards[full : full + 1])

    def place(self, num_tokens: int, running: Iterable[Running]) -> Placement | None:
        """Reserve pages for a request.

        Args:
            num_tokens: prompt and output together.
            running: admitted requests, whose pending prefill loads their groups.

        Returns:
            None if the pages are not free now.
        """
        sizes = self._shard_pages(num_tokens)
        pending = self._pending(running)
        used = [allocator.num_used for allocator in self.allocators]
        order = sorted(range(len(used)), key=lambda group: (pending[group], used[group], group))
        chosen: list[int] = []
        for size in sizes:
            group = next(
                (g for g in order if g not in chosen and self.allocators[g].num_free >= size), None
            )
            if group is None:
                return None
            chosen.append(group)
        shards = []
        for group, size in zip(chosen, sizes, strict=True):
            pages = self.allocators[group].allocate(size)
            assert pages is not None, "the pages were free a moment ago"
            shards.append(Shard(group, pages))
        return Placement(tuple(shards), self.max_tokens_per_group)

    def release(self, placement: Placement) -> None:
        """Give the pages of a request back."""
        for shard in placement.shards:
            self.allocators[shard.group].release(shard.pages)

    def reset(self) -> None:
        """Take every page back, whoever holds it."""
        self.allocators = tuple(PageAllocator(a.num_pages) for a in self.allocators)

    def _shard_pages(self, num_tokens: int) -> list[int]:
        full, rest = divmod(num_tokens, self.max_tokens_per_group)
        full_pages = self.max_tokens_per_group // self.page_size
        return [full_pages] * full + ([pages_for(rest, self.page_size)] if rest else [])

    def _pending(self, running: Iterable[Running]) -> list[int]:
        """Prefill work ahead of each group, as prompt length squared less the part done."""
        pending = [0] * len(self.allocators)
        for request in running:
            num_prompt_tokens = request.request.num_prompt_tokens
            done = min(request.num_planned, num_prompt_tokens)
            for shard in request.placement.shards:
                pending[shard.group] += num_prompt_tokens**2 - done**2
        return pending
