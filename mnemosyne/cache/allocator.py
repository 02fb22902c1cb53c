"""Pages of the pool: who holds which, and which are free. Prefers neighbouring pages."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


class PageAllocator:
    """Hands out pages with reference counts; free pages are kept as disjoint runs.

    A request that gets neighbouring pages is read as one run, without a gather, so the smallest
    run that holds all of it is taken first and only a fragmented pool splits it.

    Args:
        num_pages: pages in the pool.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._references = np.zeros(num_pages, dtype=np.int32)
        # sorted by first page; runs never touch, so they are as long as can be
        self._starts: list[int] = [0] if num_pages else []
        self._stops: list[int] = [num_pages] if num_pages else []
        # the same runs as (pages, first page), sorted: a request asks for a size
        self._by_size = [(num_pages, 0)] if num_pages else []

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> np.ndarray | None:
        """Take pages, all or none.

        Returns:
            int64 ``[count]`` page ids, ascending, or None if fewer are free.
        """
        if count > self.num_free:
            return None
        taken = []
        missing = count
        while missing:
            index = self._best_run(missing)
            start = self._starts[index]
            stop = min(self._stops[index], start + missing)
            self._shrink(index, stop)
            self._references[start:stop] = 1
            taken.append(np.arange(start, stop, dtype=np.int64))
            missing -= stop - start
        self.num_free -= count
        if len(taken) == 1:
            return taken[0]
        # ascending, so that first and last page tell whether they are neighbours
        return np.sort(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)

    def share(self, pages: np.ndarray) -> None:
        """Add a reference to pages that are in use."""
        assert (self._references[pages] > 0).all(), "a free page cannot be shared"
        self._references[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Drop a reference; pages with none left are free again.

        Args:
            pages: int64 page ids, ascending.
        """
        if len(pages) == 0:
            return
        first, stop = int(pages[0]), int(pages[-1]) + 1
        if stop - first == len(pages) and self._references[first:stop].max() == 1:
            assert self._references[first:stop].min() == 1, "a free page cannot be released"
            self._references[first:stop] = 0
            self._insert(first, stop)
            self.num_free += len(pages)
        else:
            self._release_scattered(pages)

    def _release_scattered(self, pages: np.ndarray) -> None:
        assert (self._references[pages] > 0).all(), "a free page cannot be released"
        self._references[pages] -= 1
        free = np.sort(pages[self._references[pages] == 0])
        if len(free) == 0:
            return
        breaks = np.flatnonzero(np.diff(free) != 1) + 1
        for run in np.split(free, breaks):
            self._insert(int(run[0]), int(run[-1]) + 1)
        self.num_free += len(free)

    def _best_run(self, count: int) -> int:
        """Index of the smallest run that holds ``count`` pages, else of the largest."""
        rank = bisect_left(self._by_size, (count, 0))
        if rank == len(self._by_size):  # the first of the largest
            rank = bisect_left(self._by_size, (self._by_size[-1][0], 0))
        return bisect_left(self._starts, self._by_size[rank][1])

    def _shrink(self, index: int, start: int) -> None:
        stop = self._stops[index]
        self._drop(index)
        if start < stop:
            self._keep(index, start, stop)

    def _insert(self, start: int, stop: int) -> None:
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == stop:
            stop = self._stops[index]
            self._drop(index)
        if index > 0 and self._stops[index - 1] == start:
            index -= 1
            start = self._starts[index]
            self._drop(index)
        self._keep(index, start, stop)

    def _keep(self, index: int, start: int, stop: int) -> None:
        self._starts.insert(index, start)
        self._stops.insert(index, stop)
        insort(self._by_size, (stop - start, start))

    def _drop(self, index: int) -> None:
        start, stop = self._starts.pop(index), self._stops.pop(index)
        del self._by_size[bisect_left(self._by_size, (stop - start, start))]
