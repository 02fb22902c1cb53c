"""Prompts in one table, a column per quantity, so that a thousand are put in order at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

from mnemosyne.request import Request
from mnemosyne.schedule.policy import Policy, Urgency
from mnemosyne.schedule.prefill_table import PrefillTable

Item = TypeVar("Item")
FIRST_CAPACITY = 64
FEW = 32
# The quantities. ROOM is tokens of prompt and output together; TOTAL_S and DONE_S are times of
# the prefill table, before its factor.
PRIORITY, ARRIVAL, DUE, ROOM, LENGTH, DONE, TOTAL_S, DONE_S = range(8)


class Prompts(Generic[Item]):
    """Prompts that are not computed yet, or not all of them, ordered by a policy.

    Args:
        policy: what makes one more urgent than another.
        table: predicted time by length.
    """

    def __init__(self, policy: Policy, table: PrefillTable) -> None:
        self.items: list[Item] = []  # in the order they came
        self._ids: list[int] = []
        self._policy = policy
        self._table = table
        self._version = table.version
        self._columns = np.empty((8, FIRST_CAPACITY))

    def __len__(self) -> int:
        return len(self.items)

    def add(self, request: Request, item: Item, *, due_s: float, num_done: int = 0) -> None:
        """Take a prompt in, behind all others where the policy makes no difference.

        Args:
            request: whose length the prefill table was extended to.
            item: what ``items`` holds of it.
            due_s: when its first token is due, on the clock of arrivals.
            num_done: tokens of it that are computed.
        """
        row = len(self.items)
        if row == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
        length = request.num_prompt_tokens
        total_s, done_s = self._table.until(np.array([length, num_done])).tolist()
        self._columns[:, row] = (
            *(request.priority, request.arrival_s, due_s, request.max_tokens),
            *(length, num_done, total_s, done_s),
        )
        self.items.append(item)
        self._ids.append(request.request_id)

    def discard(self, request_id: int) -> Item | None:
        """Take a prompt out; None if it is not here."""
        if request_id not in self._ids:
            return None
        row = self._ids.index(request_id)
        item = self.items[row]
        self.drop([row])
        return item

    def drop(self, rows: list[int]) -> None:
        """Take prompts out by their rows."""
        for row in sorted(rows, reverse=True):
            stop = len(self.items)
            self._columns[:, row : stop - 1] = self._columns[:, row + 1 : stop]
            del self.items[row], self._ids[row]

    def clear(self) -> None:
        """Forget all."""
        self.items.clear()
        self._ids.clear()

    def advance(self, row: int, num_done: int) -> None:
        """Note how far a prompt is computed."""
        self._columns[DONE, row] = num_done
        self._columns[DONE_S, row] = self._table.until(np.array([num_done]))[0]

    def urgency(self) -> Urgency:
        """What the policy sees of each row."""
        if self._version != self._table.version:
            self._version = self._table.version
            live = self._columns[:, : len(self.items)]
            live[TOTAL_S] = self._table.until(live[LENGTH])
            live[DONE_S] = self._table.until(live[DONE])
        live = self._columns[:, : len(self.items)]
        factor = self._table.factor()
        total_s = live[TOTAL_S] * factor
        return Urgency(live[ARRIVAL], live[DUE], total_s, total_s - live[DONE_S] * factor)

    def order(self, urgency: Urgency, now_s: float) -> np.ndarray:
        """Rows, int64 ``[B]``, the most urgent first: by priority, policy, then as they came."""
        if len(self.items) == 1:
            return np.zeros(1, dtype=np.int64)
        return np.lexsort((self._policy(urgency, now_s), self.column(PRIORITY)))

    def column(self, index: int) -> np.ndarray:
        """One quantity of all rows, such as ``LENGTH``: float64 ``[B]``."""
        return self._columns[index, : len(self.items)]


def few_by_few(rows: np.ndarray) -> Iterator[int]:
    """Rows as plain numbers, for a reader who stops early."""
    for start in range(0, len(rows), FEW):
        yield from rows[start : start + FEW].tolist()
