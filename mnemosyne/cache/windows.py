"""Pages of layers that forget: the rings of requests, and windows kept where prefixes end."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.kinds import PageKinds, Window

Rings = tuple[np.ndarray, ...]  # of each window, int64 [tracks, pages]


class Moved(NamedTuple):
    """Pages of one group whose keys and values other pages of it get."""

    group: int
    sources: np.ndarray  # int64
    targets: np.ndarray


class End(NamedTuple):
    """The windows of the token that follows a prefix of whole pages."""

    pages: Rings  # in key order
    tokens: np.ndarray  # int32, of the prefix
    used: int  # when it was last of use


class Ends:
    """The prefixes of one group whose windows are kept, by digest, least recently used first.

    A request can start after such a prefix, and nowhere else: its layers that forget see the pages
    of an end. They are copied to its ring, and so nobody ever holds an end.

    Args:
        page_size: tokens per page.

    Attributes:
        num_pages: that ``evict`` can give.
    """

    def __init__(self, page_size: int) -> None:
        self.num_pages = 0
        self._page_size = page_size
        self._ends: dict[bytes, End] = {}

    def last(self, chain: Chain, stop: int) -> int:
        """Pages of the longest prefix of a chain of at most ``stop`` pages that ends here, or 0."""
        if not self._ends:
            return 0
        for num_pages in range(min(stop, len(chain.digests)), 0, -1):
            end = self._ends.get(chain.digests[num_pages - 1])
            if end is not None and np.array_equal(end.tokens, _tokens(chain, num_pages)):
                return num_pages
        return 0

    def use(self, chain: Chain, num_pages: int, now: int) -> Rings:
        """The pages of an end that ``last`` found."""
        end = self._ends.pop(chain.digests[num_pages - 1])
        self._ends[chain.digests[num_pages - 1]] = end._replace(used=now)
        return end.pages

    def has(self, chain: Chain, num_pages: int) -> bool:
        """Return whether the windows after so many pages of a chain are kept."""
        return chain.digests[num_pages - 1] in self._ends

    def add(self, chain: Chain, num_pages: int, pages: Rings, now: int) -> None:
        """Keep the windows after so many pages of a chain."""
        self._ends[chain.digests[num_pages - 1]] = End(pages, _tokens(chain, num_pages), now)
        self.num_pages += sum(part.size for part in pages)

    @property
    def oldest(self) -> float:
        """When the end that goes first was of use; never, if there is none."""
        return next(iter(self._ends.values())).used if self._ends else inf

    def evict(self) -> np.ndarray:
        """Forget the end that was of use longest ago; its pages, int64, ascending."""
        end = self._ends.pop(next(iter(self._ends)))
        pages = flat(end.pages)
        self.num_pages -= len(pages)
        return pages

    def all_pages(self) -> np.ndarray:
        """Pages of all ends, int64."""
        return flat([part for end in self._ends.values() for part in end.pages])


def _tokens(chain: Chain, num_pages: int) -> np.ndarray:
    return chain.tokens(0, num_pages).ravel()


def flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All pages of some arrays, int64, ascending."""
    ids = [part.ravel() for part in parts]
    return np.sort(np.concatenate([*ids, np.empty(0, dtype=np.int64)]))


def seen_after(kinds: PageKinds, window: Window, num_pages: int) -> range:
    """Pages of a window that the token after so many pages sees, by their place in the prefix."""
    size = kinds.page_size
    return range(max(0, num_pages * size - window.size + 1) // size, num_pages)


def parts_of(kinds: PageKinds, rings: Rings, num_pages: int) -> Rings:
    """The pages of rings that the token after so many pages sees, in key order.

    Args:
        kinds: of layers.
        rings: of a request that computed those pages, and at most one more.
        num_pages: of its beginning.
    """
    return tuple(
        ring[:, np.array(seen_after(kinds, window, num_pages), dtype=np.int64) % ring.shape[1]]
        for window, ring in zip(kinds.windows, rings, strict=True)
    )
