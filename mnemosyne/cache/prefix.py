"""The pages of one group that hold a known prefix: found by digest, verified by tokens."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf
from typing import NamedTuple

import numpy as np

from mnemosyne.cache.chain import ID_DTYPE, Chain

MAX_COMPARED = 32  # pages that a page which is not there is compared with
NO_PAGES = np.empty(0, dtype=np.int64)


class Nearest(NamedTuple):
    """The cached page that agrees longest with a page that is not cached."""

    num_equal: int  # tokens, from the beginning of the page on
    tokens: np.ndarray  # int32 [page_size], of the cached one


class PrefixIndex:
    """Which pages of a group hold which prefix, who holds them, and which go first.

    A page that is known here has a count of its holders; one that nobody holds is *idle*: it stays
    until its place is needed. Pages of a chain go from its end, those of the chain that was used
    longest ago first. Whoever holds a page holds all that are before it, so that the pages of a
    chain are idle from some point on.

    Args:
        num_pages: of the group.
        page_size: tokens per page.

    Attributes:
        num_idle: pages that ``evict`` can give.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_idle = 0
        self._pages: dict[bytes, int] = {}  # those that can be found
        self._digests: list[bytes | None] = [None] * num_pages
        self._parents = [-1] * num_pages  # the page before, if it is on this group
        self._befores: list[bytes | None] = [None] * num_pages  # digest of all before the page
        # pages after a prefix, in order: never those of another model or salt
        self._children: dict[bytes, dict[int, None]] = {}
        # each twice: one page is asked for in Python, and many at once in numpy
        self._end = bytearray(b"\1" * num_pages)  # no page follows it
        self._found, self._counted = bytearray(num_pages), bytearray(num_pages)
        flags = self._end, self._found, self._counted
        self._is_end, self._is_found, self._is_counted = (np.frombuffer(f, bool) for f in flags)
        self._num_of, self._last_of = array("i", [0]) * num_pages, array("q", [0]) * num_pages
        self._holders = np.frombuffer(self._num_of, np.int32)
        self._used = np.frombuffer(self._last_of, np.int64)  # when it was last let go
        self._time = 0
        self._ends: list[tuple[int, int]] = []  # (used, page): idle ends, and some that were
        # it takes no memory before it is written
        self._tokens_PN = np.zeros((num_pages, page_size), dtype=ID_DTYPE)

    def count(self, chain: Chain, first: int, stop: int) -> int:
        """Pages of the longest known run of a chain, by their digests alone (see ``match``)."""
        digests, known = chain.digests, self._pages
        stop = min(stop, len(digests))
        if first >= stop or digests[first] not in known:
            return 0
        assert self._parents[known[digests[first]]] == -1, "extents begin at the same positions"
        # where a page is known, so are those before it
        return bisect_left(range(first, stop), True, key=lambda p: digests[p] not in known)

    def match(self, chain: Chain, first: int, stop: int) -> np.ndarray:
        """Pages that hold the longest known run of a chain.

        Args:
            chain: of a request.
            first: its page where the run begins.
            stop: its page before which the run ends.

        Returns:
            int64 page ids; each holds the very tokens of the chain.
        """
        count = self.count(chain, first, stop)
        if not count:
            return NO_PAGES
        found = [self._pages[digest] for digest in chain.digests[first : first + count]]
        pages = np.array(found, dtype=np.int64)
        is_equal = (self._tokens_PN[pages] == chain.tokens(first, first + count)).all(axis=1)
        return pages if is_equal.all() else pages[: int(is_equal.argmin())]

    def nearest(self, chain: Chain, page: int) -> Nearest | None:
        """The cached page nearest to a page of a chain that is not cached.

        Args:
            chain: of a request.
            page: its page, the first one that ``match`` did not find.

        Returns:
            None if nothing follows there.
        """
        after = self._children.get(chain.before(page), {})
        others = list(islice(reversed(after), MAX_COMPARED))
        wanted = chain.beginning(page)
        if not others or not len(wanted):
            return None
        tokens = self._tokens_PN[others]
        differs = tokens[:, : len(wanted)] != wanted
        num_equal = np.where(differs.any(axis=1), differs.argmax(axis=1), len(wanted))
        best = int(num_equal.argmax())
        return Nearest(int(num_equal[best]), tokens[best])

    @property
    def is_known(self) -> np.ndarray:
        """Which pages hold a known prefix, bool ``[num_pages]``."""
        return self._is_found

    def num_holders(self, page: int) -> int | None:
        """How many hold a page, None if they are not counted: then one does, or nobody."""
        return self._num_of[page] if self._counted[page] else None

    def num_held(self, pages: np.ndarray) -> int:
        """How many of some known pages somebody holds."""
        return int(np.count_nonzero(self._holders[pages]))

    def hold(self, pages: np.ndarray) -> None:
        """Count one more holder of known pages."""
        self.num_idle -= len(pages) - self.num_held(pages)
        self._holders[pages] += 1

    def add(self, chain: Chain, first: int, pages: np.ndarray, before: int | None) -> int:
        """Make pages known, up to the first one whose tokens another page holds already.

        Args:
            chain: of the request that computed them.
            first: the page of the chain that the first of them is.
            pages: that are not known, and that the request alone holds.
            before: the page before them on this group, if there is one.

        Returns:
            How many are known now.
        """
        if before is not None and not self._found[before]:
            return 0  # whoever holds a known page holds those before it
        for index, page in enumerate(pages.tolist()):
            place = first + index
            if chain.digests[place] in self._pages:
                pages = pages[:index]
                break
            self._link(page, chain, place, -1 if before is None else before)
            before = page
        if len(pages) == 0:
            return 0
        self._tokens_PN[pages] = chain.tokens(first, first + len(pages))
        self._is_counted[pages] = self._is_found[pages] = True
        self._holders[pages] = 1
        return len(pages)

    def page_of(self, digest: bytes) -> int | None:
        """The page that holds a prefix, by its digest."""
        return self._pages.get(digest)

    def let_go(self, pages: np.ndarray) -> np.ndarray:
        """Count one holder less.

        Args:
            pages: that one request held, known or not.

        Returns:
            Those that are nobody's now, and not known.
        """
        self._time += 1
        counted = pages[self._is_counted[pages]]
        self._holders[counted] -= 1
        self._used[counted] = self._time
        left = counted[self._holders[counted] == 0]
        idle = left[self._is_found[left]]
        self.num_idle += len(idle)
        for page in idle[self._is_end[idle]].tolist():
            self._note_end(page)
        forgotten = left[~self._is_found[left]]
        self._is_counted[forgotten] = False
        return pages[~self._is_counted[pages]]

    @property
    def now(self) -> int:
        """A clock that ticks when a request lets go."""
        return self._time

    @property
    def oldest(self) -> float:
        """When the chain whose end goes first was last used; never, if none is idle."""
        while self._ends and not self._is_idle_end(self._ends[0][1], self._ends[0][0]):
            heappop(self._ends)
        return self._ends[0][0] if self._ends else inf

    def evict(self, count: int) -> np.ndarray:
        """Forget idle pages, the ends of the chains that were used longest ago.

        Args:
            count: at most ``num_idle``.

        Returns:
            int64 page ids, which are nobody's now.
        """
        gone: list[int] = []
        while len(gone) < count:
            used, page = popped = heappop(self._ends)
            while self._is_idle_end(page, used):
                gone.append(page)
                page = self._unlink(page)
                if len(gone) == count:
                    break
            if page >= 0 and popped != (used, page):
                self._note_end(page)
        self.num_idle -= count
        return np.array(gone, dtype=np.int64)

    def clear(self) -> np.ndarray:
        """Forget all; pages that are held are counted until they are let go.

        Returns:
            int64 ids of the pages that were idle, which are nobody's now.
        """
        idle = np.flatnonzero(self._is_found & (self._holders == 0))
        self._is_counted[idle] = False
        self._is_found[:] = False
        self._is_end[:] = True
        self._parents = [-1] * len(self._parents)
        self._digests, self._befores = [None] * len(self._digests), [None] * len(self._befores)
        self._pages.clear()
        self._children.clear()
        self._ends.clear()
        self.num_idle = 0
        return idle

    def _note_end(self, page: int) -> None:
        """Have a page among those that go first, if it is idle and an end."""
        used = self._last_of[page]
        if not self._is_idle_end(page, used):
            return
        heappush(self._ends, (used, page))
        if len(self._ends) > 2 * len(self._digests) + MAX_COMPARED:  # most of them are not any more
            self._ends = [end for end in set(self._ends) if self._is_idle_end(end[1], end[0])]
            heapify(self._ends)

    def _is_idle_end(self, page: int, used: int) -> bool:
        """Return whether a page that was last let go at some time can be forgotten now."""
        if page < 0 or not (self._found[page] and self._end[page]):
            return False
        return self._num_of[page] == 0 and self._last_of[page] == used

    def _link(self, page: int, chain: Chain, place: int, before: int) -> None:
        digest, prefix = chain.digests[place], chain.before(place)
        self._pages[digest], self._digests[page] = page, digest
        self._parents[page], self._befores[page] = before, prefix
        self._children.setdefault(prefix, {})[page] = None
        self._end[page] = True
        if before >= 0:
            self._end[before] = False

    def _unlink(self, page: int) -> int:
        """Make a page unknown; the page before it, or -1."""
        digest, before, prefix = self._digests[page], self._parents[page], self._befores[page]
        assert digest is not None
        assert prefix is not None
        del self._pages[digest]
        self._digests[page], self._parents[page], self._befores[page] = None, -1, None
        self._counted[page] = self._found[page] = False
        siblings = self._children[prefix]
        del siblings[page]
        if not siblings:
            del self._children[prefix]
            if before >= 0:
                self._end[before] = True
        return before
