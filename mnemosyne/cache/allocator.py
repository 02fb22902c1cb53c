"""Pages of the pool: which are free. Prefers neighbouring pages."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


class PageAllocator:
    """Hands out pages; free ones are kept as disjoint runs.

    A request that gets neighbouring pages is read as one run, without a gather, so the smallest
    run that holds all of it is taken first and only a fragmented pool splits it.

    Args:
        num_pages: pages in the pool.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._ids = np.arange(num_pages, dtype=np.int64)
        self._ids.flags.writeable = False  # parts of it are handed out
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
        self.num_free -= count
        taken = []
        while count:
            start, stop = self._take(count)
            taken.append(self._ids[start:stop])
            count -= stop - start
        if len(taken) == 1:
            return taken[0]
        # ascending, so that first and last page tell whether they are neighbours
        return np.sort(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)

    def release(self, pages: np.ndarray) -> None:
        """Give pages back.

        Args:
            pages: int64 page ids, ascending.
        """
        if len(pages) == 0:
            return
        first, stop = int(pages[0]), int(pages[-1]) + 1
        if stop - first == len(pages):
            self._insert(first, stop)
        else:
            for run in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
                self._insert(int(run[0]), int(run[-1]) + 1)
        self.num_free += len(pages)

    def _take(self, most: int) -> tuple[int, int]:
        """First page and end of the smallest run of ``most`` pages, else of the largest run."""
        rank = bisect_left(self._by_size, (most, 0))
        if rank == len(self._by_size):  # the first of the largest
            rank = bisect_left(self._by_size, (self._by_size[-1][0], 0))
        size, start = self._by_size.pop(rank)
        index = bisect_left(self._starts, start)
        if size <= most:
            del self._starts[index], self._stops[index]
            return start, start + size
        self._starts[index] = start + most
        insort(self._by_size, (size - most, start + most))
        return start, start + most

    def _insert(self, start: int, stop: int) -> None:
        """Add free pages, as one run with those they touch."""
        index = bisect_left(self._starts, start)
        has_before, has_after = index > 0, index < len(self._starts)
        is_used = not has_before or self._stops[index - 1] <= start
        is_used &= not has_after or stop <= self._starts[index]
        assert is_used, "a free page cannot be released"
        if has_after and self._starts[index] == stop:
            stop = self._drop(index)[1]
        if has_before and self._stops[index - 1] == start:
            index -= 1
            start = self._drop(index)[0]
        self._starts.insert(index, start)
        self._stops.insert(index, stop)
        insort(self._by_size, (stop - start, start))

    def _drop(self, index: int) -> tuple[int, int]:
        start, stop = self._starts.pop(index), self._stops.pop(index)
        del self._by_size[bisect_left(self._by_size, (stop - start, start))]
        return start, stop
