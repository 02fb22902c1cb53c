"""The queue of prompts with tokens left to compute, ordered by a policy."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from math import inf

import numpy as np

from mnemosyne.schedule.policy import Policy, Urgency, slack_s
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.request_state import RequestState

FEW = 8  # prompts that are compared one by one, and of many those that are looked for first
# Cells of a prompt: its ``Urgency``, then priority and tokens of the pages that it needs.
ARRIVAL, DUE, TOTAL_S, DONE_S, PRIORITY, TOKENS = range(6)
NUM_CELLS = 6
LAST = float(
    np.finfo(np.float64).max
)  # the largest key: inf marks prompts that are taken or left out


class PrefillQueue:
    """Prompts with tokens left to compute, ordered by a policy.

    A few are compared one by one. Many are weighed at once: what is known of them stands in a
    table as well, which Python changes in a moment and numpy reads without a copy. A prompt is
    found by its ticket: tickets rise, so that they are sorted as the prompts stand.

    Args:
        policy: what makes one more urgent than another.
        table: predicted time by length.
    """

    def __init__(self, policy: Policy, table: PrefillTable) -> None:
        self._key = policy.key
        self._table = table
        self._version = table.version
        self._num_taken = 0  # ever
        self.clear()

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> None:
        """Forget all."""
        self._items: list[RequestState] = []  # as they came
        self._tickets: list[int] = []  # theirs
        self._cells = array("d")  # of all if they are many, else of the first ones
        self._is_mixed = False  # whether there may be several priorities

    def add(self, prompt: RequestState) -> None:
        """Take a prompt in, behind all others where the policy makes no difference."""
        prompt.ticket = self._num_taken
        self._num_taken += 1
        self._items.append(prompt)
        self._tickets.append(prompt.ticket)
        if prompt.request.priority != self._items[0].request.priority:
            self._is_mixed = True
        if len(self._items) > FEW:
            self._fill()

    def remove(self, prompts: Iterable[RequestState]) -> None:
        """Take prompts out."""
        for row in sorted([self._row(prompt) for prompt in prompts], reverse=True):
            del self._items[row], self._tickets[row]
            del self._cells[row * NUM_CELLS : (row + 1) * NUM_CELLS]

    def update(self, prompt: RequestState) -> None:
        """Note that more or less of a prompt is cached."""
        cell = self._row(prompt) * NUM_CELLS
        if cell < len(self._cells):
            self._cells[cell : cell + NUM_CELLS] = array("d", _cells_of(prompt))

    def advance(self, prompt: RequestState) -> None:
        """Note that more of a prompt is planned."""
        cached_s = self._table.at(prompt.num_cached) if prompt.num_cached else 0.0
        prompt.done_s = self._table.at(prompt.num_planned) - cached_s
        if not self._cells:
            return
        cell = self._row(prompt) * NUM_CELLS + DONE_S
        if cell < len(self._cells):
            self._cells[cell] = prompt.done_s

    def follow_table(self) -> float:
        """Look the times up again if the table was rebuilt; to be called before what follows.

        Returns:
            The factor from seconds of the table to seconds as the machine is now.
        """
        if self._version != self._table.version:
            self._version = self._table.version
            lengths = np.array([prompt.request.num_prompt_tokens for prompt in self._items])
            planned = np.array([prompt.num_planned for prompt in self._items])
            cached_s = self._table.until(np.array([prompt.num_cached for prompt in self._items]))
            totals_s = (self._table.until(lengths) - cached_s).tolist()
            dones_s = (self._table.until(planned) - cached_s).tolist()
            for prompt, total_s, done_s in zip(self._items, totals_s, dones_s, strict=True):
                prompt.total_s, prompt.done_s = total_s, done_s
            del self._cells[:]
        return self._table.factor()

    def in_order(
        self, now_s: float, factor: float, max_tokens: float = inf
    ) -> Iterator[RequestState]:
        """Prompts, the most urgent first: by priority, policy, then as they came.

        Args:
            now_s: seconds on the clock of arrivals.
            factor: as ``follow_table`` returned it.
            max_tokens: tokens of needed pages above which a request is left out.

        Returns:
            Prompts for a reader who stops early, and before any is added or removed.
        """
        if len(self._items) > FEW:
            keys = self._key(self._urgency(), now_s, factor)
            return self._many_in_order(np.fmin(keys, LAST), max_tokens)
        few = [
            (prompt.request.priority, self._key(prompt, now_s, factor), prompt.ticket, prompt)
            for prompt in self._items
            if prompt.num_needed <= max_tokens
        ]
        few.sort()
        return iter([prompt for *_, prompt in few])

    def overdue(self, now_s: float, factor: float, over_tokens: float) -> list[RequestState]:
        """Requests of more than ``over_tokens`` tokens without time to spare, in order of age."""
        is_late = slack_s(self._urgency(), now_s, factor) <= 0
        rows = np.flatnonzero(is_late & (self._columns()[TOKENS] > over_tokens)).tolist()
        late = [self._items[row] for row in rows]
        return sorted(late, key=lambda p: (p.request.priority, p.arrival_s, p.ticket))

    def largest_tokens(self) -> float:
        """Tokens of the pages that the largest request needs."""
        if len(self._items) <= FEW:
            return max((prompt.num_needed for prompt in self._items), default=0)
        return float(self._columns()[TOKENS].max())

    def _many_in_order(self, keys: np.ndarray, max_tokens: float) -> Iterator[RequestState]:
        """Prompts by their keys, class by class; each of them once, even if keys are nan."""
        classes = [self._items[0].request.priority]
        if self._is_mixed:
            classes = np.unique(self._columns()[PRIORITY]).tolist()
            self._is_mixed = len(classes) > 1
        for priority in classes:
            count, own = len(keys), keys
            if self._is_mixed or max_tokens < inf:
                columns = self._columns()
                is_own = (columns[PRIORITY] == priority) & (columns[TOKENS] <= max_tokens)
                del columns
                count, own = int(np.count_nonzero(is_own)), np.where(is_own, keys, inf)
            for row in _smallest_first(own, count):
                yield self._items[row]

    def _row(self, prompt: RequestState) -> int:
        return bisect_left(self._tickets, prompt.ticket)

    def _urgency(self) -> Urgency[np.ndarray]:
        return Urgency(*self._columns()[:PRIORITY])

    def _columns(self) -> np.ndarray:
        """The cells of all, by quantity: ``[6, B]``; let go before any is added or removed."""
        self._fill()
        return np.frombuffer(self._cells).reshape(-1, NUM_CELLS).T

    def _fill(self) -> None:
        for prompt in self._items[len(self._cells) // NUM_CELLS :]:
            self._cells.fromlist(_cells_of(prompt))


def _cells_of(prompt: RequestState) -> list[float]:
    times_s = [prompt.arrival_s, prompt.due_s, prompt.total_s, prompt.done_s]
    return [*times_s, float(prompt.request.priority), float(prompt.num_needed)]


def _smallest_first(keys: np.ndarray, count: int) -> Iterator[int]:
    """The first ``count`` rows by their keys, equal ones in their order; the keys are lost.

    Args:
        keys: below inf in at least ``count`` rows.
        count: rows to give.
    """
    for _ in range(min(count, FEW)):
        row = int(keys.argmin())
        yield row
        keys[row] = inf
    if count > FEW:
        yield from keys.argsort(kind="stable")[: count - FEW].tolist()
