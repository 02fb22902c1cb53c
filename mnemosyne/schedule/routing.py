"""Which groups hold the cache of a request. Groups are replicas for all but the longest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place
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
        while chain is not None and num_cacheable:
            places = self._choose_near(num_tokens, free, chain, num_cacheable)
            if places is None or self._can_start(places):
                return places
            # its windows are kept further on than its pages are known
            num_known = sum(len(place.shared) for place in places)
            num_cacheable = self._ledger.last_end(places[0].group, chain, num_known)
        chosen = _assign(sizes, self._least_pending(), free)
        return None if chosen is None else [Place(group) for group in chosen]

    def _choose_near(
        self, num_tokens: int, free: list[int], chain: Chain, num_cacheable: int
    ) -> list[Place] | None:
        """The same where groups differ in what they hold of the prompt.

        What a group holds is work that it need not do: the square of its tokens, as for pending
        work. A shard can have a known prefix only if those before it are known to their ends.
        """
        ledger, places, first = self._ledger, list[Place](), 0
        groups, is_whole, stop_at = list(ledger.groups), True, num_cacheable
        sizes = zip(ledger.shard_sizes(num_tokens), ledger.shard_needs(num_tokens), strict=True)
        for size, needs in sizes:
            stop = min(first + size, stop_at) if is_whole else first
            shards = [self._shard(g, chain, first, stop, num_cacheable) for g in groups]
            if len(shards) > 1:
                shards.sort(key=lambda place: self._work_at(place, first))
            needed = (needs - ledger.num_held(place) for place in shards)
            fits = (p for p, n in zip(shards, needed, strict=True) if free[p.group] >= n)
            place = next(fits, None)
            if place is None:
                return None
            places.append(place)
            groups.remove(place.group)
            if not first and ledger.kinds.windows:
                stop_at = place.num_ended
            is_whole, first = len(place.shared) == size, first + size
        return places

    def _can_start(self, places: list[Place]) -> bool:
        """Return whether a request finds its windows where its known pages end."""
        kinds = self._ledger.kinds
        if not kinds.windows or not kinds.keeps:
            return True
        return sum(len(place.shared) for place in places) == places[0].num_ended

    def _shard(self, group: int, chain: Chain, first: int, stop: int, num_cacheable: int) -> Place:
        """A shard on a group, with what is known there of its pages from ``first`` to ``stop``."""
        ledger = self._ledger
        if first or not ledger.kinds.windows:
            return Place(group, ledger.match(group, chain, first, stop))
        num_ended = ledger.last_end(group, chain, num_cacheable)
        return Place(group, ledger.match(group, chain, 0, min(stop, num_ended)), num_ended)

    def _work_at(self, place: Place, first: int) -> tuple[int, int]:
        """The key that decides between groups: work ahead and of the prompt, then pages in use."""
        ledger, num_known = self._ledger, max(len(place.shared), place.num_ended)
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
