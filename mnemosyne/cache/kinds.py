"""Kinds of layers: those that keep every key, and those that keep what a window still sees.

A page holds the keys of as many layers as see everything. Layers of a window lie in *tracks* of at
most so many: one page of the window takes a page of the pool in each track. So all pages are of one
size, and any free one serves any kind.

The pages of a window are a *ring*: position p lies in page ``p // page_size`` modulo their number.
They suffice for a request of any length, and its table need not change while it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple, Self

from mnemosyne.cache.layout import pages_for

ENDLESS = 2**40  # tokens: where no layer keeps every key, pages bound no length
MOST_SPARE = 1.15  # bytes of a token in all kinds, over what its layers need


class Window(NamedTuple):
    """Layers that see the last positions alone."""

    size: int  # positions that a row sees, its own included
    tracks: int


@dataclass(frozen=True, slots=True)
class PageKinds:
    """The pages that a request takes, by kind of layers.

    Args:
        page_size: tokens per page.
        windows: kinds that forget, the smallest window first.
        keeps: whether there are layers that keep every key.
    """

    page_size: int
    windows: tuple[Window, ...] = ()
    keeps: bool = True

    @classmethod
    def of(cls, windows: Sequence[int | None], page_size: int) -> Self:
        """The kinds of a model.

        A window of so few layers that tracks would be mostly empty is kept whole, as if its layers
        saw everything.

        Args:
            windows: of all layers; None for those that see everything.
            page_size: tokens per page.
        """
        counts = Counter(windows)
        num_kept = counts.pop(None, 0)
        while num_kept and counts:
            num_tracks = sum(-(-count // num_kept) for count in counts.values())
            if (1 + num_tracks) * num_kept <= MOST_SPARE * len(windows):
                break
            num_kept += counts.pop(min(counts, key=lambda window: counts[window]))
        width = num_kept or gcd(*counts.values())
        forgetful = [(size, count) for size, count in counts.items() if size is not None]
        tracks = tuple(Window(size, -(-count // width)) for size, count in sorted(forgetful))
        return cls(page_size, tracks, keeps=num_kept > 0)

    @property
    def num_tracks(self) -> int:
        """Pages that hold the same few tokens of a request in all layers."""
        return self.keeps + sum(window.tracks for window in self.windows)

    def tracks_of(self, windows: Sequence[int | None]) -> list[int]:
        """The track of each layer that a rank holds; layers that keep every key are in the first.

        Args:
            windows: of the layers.
        """
        first, firsts = int(self.keeps), {}
        for window in self.windows:
            firsts[window.size] = first, window.tracks
            first += window.tracks
        seen, tracks = Counter[int](), []
        for size in windows:
            start, num_tracks = firsts.get(size or 0, (0, 1))
            tracks.append(start + seen[start] % num_tracks)
            seen[start] += 1
        return tracks

    def layers_per_page(self, windows: Sequence[int | None]) -> int:
        """Layers of which a page holds the keys, on a rank with these.

        Args:
            windows: of its layers.
        """
        return max(Counter(self.tracks_of(windows)).values())

    def ring(self, window: Window) -> int:
        """Pages of a window in each track: those that a row sees, and one more.

        Chunks of up to a page find room in it whatever they see.
        """
        return (max(window.size, 2) - 2) // self.page_size + 3

    def num_passing(self, max_rows: int) -> int:
        """Pages beside those of requests for what no ring has room for.

        Args:
            max_rows: of a step, in its chunks.
        """
        return max_rows // self.page_size if self.windows else 0

    def rings(self, num_tokens: int) -> list[int]:
        """Pages in each track of each window that a request takes.

        Args:
            num_tokens: of the request.
        """
        num_pages = pages_for(num_tokens, self.page_size)
        return [min(self.ring(window), num_pages) for window in self.windows]

    def ring_pages(self, num_tokens: int) -> int:
        """Pages of all windows that a request takes.

        Args:
            num_tokens: of the request.
        """
        rings = zip(self.windows, self.rings(num_tokens), strict=True)
        return sum(window.tracks * count for window, count in rings)

    def pages(self, num_tokens: int) -> int:
        """Pages of a request that lies whole on one group.

        Args:
            num_tokens: of the request.
        """
        kept = pages_for(num_tokens, self.page_size) if self.keeps else 0
        return kept + self.ring_pages(num_tokens)

    def most_tokens(self, num_pages: int) -> int:
        """Tokens of the longest request that so many pages hold, whole pages."""
        if not self.windows:
            return num_pages * self.page_size
        low, high = 0, ENDLESS // self.page_size
        while low < high:
            middle = (low + high + 1) // 2
            if self.pages(middle * self.page_size) <= num_pages:
                low = middle
            else:
                high = middle - 1
        return low * self.page_size

    def capacity(self, num_pages: int) -> int:
        """Tokens whose keys so many pages hold at a time."""
        if self.keeps:
            return self.most_tokens(num_pages)
        return num_pages // self.num_tracks * self.page_size
