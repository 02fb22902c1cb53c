"""Which groups hold the cache of a request. Groups are replicas for all but the longest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.ledger import Ledger, Place
from mnemosyne.cache.table import PageTable

NOTHING: Mapping[int, int] = MappingProxyType({})


class Router:
    """Chooses the groups of each request, and nothing else.

    A request takes as many groups as its tokens need; the groups with the least pending prefill
    come first, and among equals those with the fewest pages in use. Pages for its whole life are
    reserved at once, because growth that waits for pages could deadlock. Prefill work is counted
    as prompt length squared less the part done, or cached.

    Args:
        ledger: the pages of each group.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.clear()

    def clear(self) -> None:
        """Forget all work."""
        self._pending = [0] * len(self._ledger.group_pages)  # prefill work ahead of each group

    def choose(
        self,
        num_tokens: int,
        *,
        kept: Mapping[int, int] = NOTHING,
        chain: Chain | None = None,
        num_cacheable: int = 0,
    ) -> list[Place] | None:
        """Places for the shards of a request, in the order of positions.

        Args:
            num_tokens: prompt and output together.
            kept: pages of some groups that are free but not for this request.
            chain: its tokens, where prefixes are shared.
            num_cacheable: pages of it, the first ones, that may be those of others.

        Returns:
            None if the pages are not free now.
        """
        free, sizes = self._free(), self._ledger.shard_needs(num_tokens)
        if kept:
            for group, pages in kept.items():
                free[group] -= pages
        if chain is not None and num_cacheable:
            return self._choose_near(sizes, free, chain, num_cacheable)
        chosen = _assign(sizes, self._least_pending(), free)
        return None if chosen is None else [Place(group) for group in chosen]

    def _choose_near(
        self, sizes: list[int], free: list[int], chain: Chain, num_cacheable: int
    ) -> list[Place] | None:
        """The same where groups differ in what they hold of the prompt.

        What a group holds is work that it need not do: the square of its tokens, as for pending
        work. A shard can have a known prefix only if those before it are known to their ends.
        """
        ledger, places, first = self._ledger, list[Place](), 0
        groups, is_whole = list(ledger.groups), True
        for size in sizes:
            stop = min(first + size, num_cacheable) if is_whole else first
            shards = [Place(g, ledger.match(g, chain, first, stop)) for g in groups]
            if len(shards) > 1:
                shards.sort(key=lambda place: self._work_at(place, first))
            needed = (size - ledger.num_held(place) for place in shards)
            fits = (p for p, n in zip(shards, needed, strict=True) if free[p.group] >= n)
            place = next(fits, None)
            if place is None:
                return None
            places.append(place)
            groups.remove(place.group)
            is_whole, first = len(place.shared) == size, first + size
        return places

    def _work_at(self, place: Place, first: int) -> tuple[int, int]:
        """The key that decides between groups: work ahead and of the prompt, then pages in use."""
        ledger, num_known = self._ledger, len(place.shared)
        saved = (first + num_known) * ledger.page_size if num_known else 0
        num_used = ledger.group_pages[place.group] - ledger.num_free(place.group)
        return self._pending[place.group] - saved**2, num_used

    def has_room(self, num_tokens: int) -> bool:
        """Return whether a request would find its pages now."""
        free = self._free()
        sizes = self._ledger.shard_needs(num_tokens)
        return _assign(sizes, range(len(free)), free) is not None

    def best_groups(self, num_tokens: int) -> dict[int, int]:
        """Pages by group of a request that the empty cache would hold, where most are free now."""
        ledger = self._ledger
        order = sorted(ledger.groups, key=lambda group: -ledger.num_free(group))
        sizes = ledger.shard_needs(num_tokens)
        chosen = _assign(sizes, order, ledger.group_pages)
        assert chosen is not None, "a request that never fits is refused"
        return dict(zip(chosen, sizes, strict=True))

    def is_idle(self, group: int) -> bool:
        """Return whether no prompt is left to compute of those that live in a group."""
        return self._pending[group] == 0

    def start(self, table: PageTable, num_prompt_tokens: int) -> None:
        """Take note of a request of whose prompt nothing is computed yet."""
        self.advance(table, num_prompt_tokens, 0)

    def advance(self, table: PageTable, start: int, stop: int) -> None:
        """Take note that a request was prefilled from position ``start`` to ``stop``."""
        amount = start * start - stop * stop
        for extent in table.extents:
            self._pending[extent.group] += amount

    def _free(self) -> list[int]:
        """Pages of each group that a request can have."""
        ledger = self._ledger
        return [min(ledger.num_free(g), ledger.num_listable(g)) for g in ledger.groups]

    def _least_pending(self) -> Sequence[int]:
        """Groups, that with the least prefill ahead of it first."""
        ledger, groups = self._ledger, self._ledger.groups
        if len(groups) == 1:
            return groups
        num_used = [ledger.group_pages[g] - ledger.num_free(g) for g in groups]
        return sorted(groups, key=lambda g: (self._pending[g], num_used[g]))


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
