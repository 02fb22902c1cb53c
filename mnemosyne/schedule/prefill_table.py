"""Predicted time of prefilling a prompt alone, by its length."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import ceil, inf

import numpy as np

from mnemosyne.schedule.chunking import solve_lone_chunk, solve_lone_count
from mnemosyne.schedule.work import StepWork

NODE_RATIO = 1.125  # of neighbouring lengths far out, where one chunk changes little
SPARE = 0.25  # of a chunk that the others take along: sizes are rounded
STALE_SHAPE = 0.1  # change of one chunk against another after which the table is rebuilt


class PrefillTable:
    """``C[length]``: the chunk rule run over the predictor, once for all prompts.

    Lengths between two nodes are interpolated. Far out a node stands for many chunks: the time
    of a chunk grows linearly with what is before it, so their mean is that of the first and last.
    When the machine as a whole becomes slower or faster, the table follows by one factor; when
    near and far chunks change differently, it is rebuilt.

    Args:
        work: of a step with ``num_tokens`` tokens from position ``start``.
        predict: seconds for it.
        min_chunk: smallest chunk, tokens.
        max_chunk: largest chunk, tokens.
        depth: chunks of one prompt that are under way at a time, in a pipeline of so many stages.
    """

    def __init__(
        self,
        work: Callable[[int, int], StepWork],
        predict: Callable[[StepWork], float],
        *,
        min_chunk: int,
        max_chunk: int,
        depth: int = 1,
    ) -> None:
        self.version = 0  # rises when lengths have to be looked up again
        self._work = work
        self._predict = predict
        self._min_chunk = min_chunk
        self._max_chunk = max_chunk
        self._depth = depth
        self._longest = 0  # of all prompts: a rebuilt table serves those that wait as well
        # tokens of a prompt, groups that share it, and its chunks
        self._flow: tuple[int, int, int]
        self._clear()

    def seconds(self, done: int, total: int) -> float:
        """Time to prefill tokens ``done`` to ``total`` of a prompt, alone."""
        self.extend(total)
        return self.factor() * (self.at(total) - self.at(done))

    def at(self, num_tokens: int) -> float:
        """Seconds of the first tokens of one prompt, before ``factor``, as ``until`` has them."""
        node = bisect_right(self._ends, num_tokens) - 1
        start, start_s = self._ends[node], self._seconds[node]
        if node + 1 == len(self._ends):
            return start_s
        rate = (self._seconds[node + 1] - start_s) / (self._ends[node + 1] - start)
        return start_s + rate * (num_tokens - start)

    def pace(self, done: int, total: int, max_s: float = inf, num_groups: int = 1) -> float:
        """Seconds of the next step of a lone prompt, so that its chunks take equally long.

        Args:
            done: tokens that are planned.
            total: of the prompt.
            max_s: seconds that a step may take; the same for all prompts.
            num_groups: that share each chunk evenly.

        Returns:
            ``max_s`` for the last chunk, which takes all that is left.
        """
        self.extend(total)

        def seconds(start: int, size: int) -> float:
            return self._predict_at(start, -(-size // num_groups))

        if self._flow[:2] != (total, num_groups):
            count = solve_lone_count(
                seconds,
                total,
                self._depth,
                min_chunk=self._min_chunk * num_groups,
                max_chunk=self._max_chunk * num_groups,
                max_s=max_s,
            )
            self._flow = (total, num_groups, count)
        done_share = self.at(done) / self.at(total) if self.at(total) > 0 else done / total
        num_left = ceil(self._flow[2] * (1 - done_share) - SPARE)
        if num_left <= 1:
            return max_s
        size = -(-(total - done) // num_left)
        return min(max_s, seconds(done + (total - done - size) // 2, size))

    def until(self, num_tokens: np.ndarray) -> np.ndarray:
        """Seconds of the first tokens of a prompt, before ``factor``.

        Args:
            num_tokens: lengths that ``extend`` has seen, ``[B]``.

        Returns:
            float64 ``[B]``.
        """
        return np.interp(num_tokens, *self._nodes)

    def factor(self) -> float:
        """The factor by which the machine is slower now than when the table was made."""
        if self._first_s <= 0:
            return 1.0 / self._depth
        return self._predict(self._first) / self._first_s / self._depth

    def extend(self, num_tokens: int) -> None:
        """Extend the table to prompts of this length, and follow a predictor that has learned."""
        if self._is_stale():
            self._clear()
        self._longest = max(self._longest, num_tokens)
        if self._ends[-1] >= self._longest:
            return
        while self._ends[-1] < self._longest:
            self._add_node(self._ends[-1])
        self._nodes = np.array([self._ends, self._seconds])

    def _clear(self) -> None:
        self.version += 1
        self._ends = [0]  # tokens computed at each node
        self._seconds = [0.0]  # time spent until then, not overlapped
        self._nodes = np.zeros((2, 1))  # both
        self._first_s = 0.0  # of the chunk at 0
        self._last_s = 0.0  # of that before the last node
        self._flow = 0, 1, 0

    def _add_node(self, start: int) -> None:
        chunk = self._chunk(start)
        first = self._work(start, chunk)
        first_s = self._predict(first)
        end = max(start + chunk, int(start * NODE_RATIO))
        self._last = self._work(end - chunk, chunk)
        self._last_s = self._predict(self._last)
        rate = (first_s + self._last_s) / 2 / chunk
        self._ends.append(end)
        self._seconds.append(self._seconds[-1] + rate * (end - start))
        if start == 0:
            self._first, self._first_s = first, first_s

    def _chunk(self, start: int) -> int:
        return solve_lone_chunk(
            lambda size: self._predict_at(start, size),
            remaining=2**62,
            min_chunk=self._min_chunk,
            max_chunk=self._max_chunk,
        )

    def _predict_at(self, start: int, num_tokens: int) -> float:
        return self._predict(self._work(start, num_tokens))

    def _is_stale(self) -> bool:
        """Return whether the predictor has changed since, or a far chunk has."""
        if self._first_s <= 0:
            return len(self._ends) > 1
        first_s, last_s = self._predict(self._first), self._predict(self._last)
        expected = first_s * self._last_s
        return abs(last_s * self._first_s - expected) > STALE_SHAPE * expected
