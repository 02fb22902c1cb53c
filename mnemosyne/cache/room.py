"""How many pages there are in each group, and how many of them a request takes."""

from __future__ import annotations

from collections.abc import Sequence

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import pages_for


class Room:
    """The sizes of an empty cache.

    Args:
        num_pages: of each group.
        kinds: of layers.
        max_tokens_per_group: tokens of one request that a group holds at most; whole pages.
    """

    def __init__(
        self, num_pages: Sequence[int], kinds: PageKinds, max_tokens_per_group: int
    ) -> None:
        assert max_tokens_per_group % kinds.page_size == 0, "a shard ends with a page"
        self.group_pages = tuple(num_pages)
        self.kinds = kinds
        self.page_size = kinds.page_size
        self.max_tokens_per_group = max_tokens_per_group

    @property
    def groups(self) -> range:
        return range(len(self.group_pages))

    @property
    def num_pages(self) -> int:
        """Pages of all groups."""
        return sum(self.group_pages)

    def max_request_tokens(self) -> int:
        """Tokens of the longest request that the empty cache holds."""
        rooms = (self.kinds.most_tokens(count) for count in self.group_pages)
        shards = sorted((min(room, self.max_tokens_per_group) for room in rooms), reverse=True)
        # only full shards can be followed by another one
        full = sum(1 for shard in shards if shard == self.max_tokens_per_group)
        return full * self.max_tokens_per_group + sum(shards[full : full + 1])

    def most_requests(self, num_tokens: int) -> int:
        """Requests of one length that empty groups surely hold, no two shards of one on one."""
        needs = self.shard_needs(num_tokens)
        if len(needs) > len(self.groups):
            return 0
        return sum(count // max(needs) for count in self.group_pages) // len(needs)

    def bound_by(self) -> str:
        """The key that bounds the longest request."""
        rooms = (self.kinds.most_tokens(count) for count in self.group_pages)
        is_cut = all(room > self.max_tokens_per_group for room in rooms)
        return "cache.max_tokens_per_group" if is_cut else "cache.max_tokens"

    def num_tokens(self) -> int:
        """Tokens that all groups hold."""
        return sum(self.kinds.capacity(count) for count in self.group_pages)

    def shard_needs(self, num_tokens: int) -> list[int]:
        """Pages that each shard of a request takes; those of layers that forget are the first's."""
        needs = self.shard_sizes(num_tokens)
        if self.kinds.windows:
            needs[0] += self.kinds.ring_pages(num_tokens)
        return needs

    def shard_sizes(self, num_tokens: int) -> list[int]:
        """Pages of each shard, those of layers that keep every key; one without any if none do."""
        return self.shard_pages(num_tokens) if self.kinds.keeps else [0]

    def shard_pages(self, num_tokens: int) -> list[int]:
        """Full pages of each shard of a request, in the order of positions."""
        if num_tokens <= self.max_tokens_per_group:
            return [pages_for(num_tokens, self.page_size)]
        full, rest = divmod(num_tokens, self.max_tokens_per_group)
        sizes = [self.max_tokens_per_group // self.page_size] * full
        if rest:
            sizes.append(pages_for(rest, self.page_size))
        return sizes
