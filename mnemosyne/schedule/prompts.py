"""Prompts in one table, a column per quantity, so that a thousand are weighed at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

from mnemosyne.request import Request
from mnemosyne.schedule.policy import Policy, Urgency
from mnemosyne.schedule.prefill_table import PrefillTable

Item = TypeVar("Item")
FIRST_CAPACITY = 64
FEW = 32  # rows that are put in order at once
# The quantities. ROOM is tokens of prompt and output together; TOTAL_S and DONE_S are times of
# the prefill table, before its factor; TURN counts prompts as they came.
PRIORITY, ARRIVAL, DUE, ROOM, LENGTH, DONE, TOTAL_S, DONE_S, TURN = range(9)


class Prompts(Generic[Item]):
    """Prompts that are not computed yet, or not all of them, ordered by a policy.

    Rows are in no order and change as prompts leave: taking one out costs the same however many
    there are.

    Args:
        policy: what makes one more urgent than another.
        table: predicted time by length.
    """

    def __init__(self, policy: Policy, table: PrefillTable) -> None:
        self.items: list[Item] = []  # by row
        self._ids: list[int] = []  # by row
        self._rows: dict[int, int] = {}  # by request
        self._num_taken = 0  # ever
        self._policy = policy
        self._table = table
        self._version = table.version
        self._columns = np.empty((9, FIRST_CAPACITY))

    def __len__(self) -> int:
        return len(self.items)

    def add(self, request: Request, item: Item, *, due_s: float) -> None:
        """Take a prompt in, behind all others where the policy makes no difference.

        Args:
            request: whose length the prefill table was extended to.
            item: what ``items`` holds of it.
            due_s: when its first token is due, on the clock of arrivals.
        """
        row, length = len(self.items), request.num_prompt_tokens
        if row == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
        self._columns[:, row] = (
            *(request.priority, request.arrival_s, due_s, request.max_tokens, length, 0),
            *(self._table.at(length), 0.0, self._num_taken),
        )
        self._num_taken += 1
        self._rows[request.request_id] = row
        self.items.append(item)
        self._ids.append(request.request_id)

    def row(self, request_id: int) -> int | None:
        """Where a prompt is; None if it is not here."""
        return self._rows.get(request_id)

    def discard(self, request_id: int) -> Item | None:
        """Take a prompt out; None if it is not here."""
        row = self.row(request_id)
        if row is None:
            return None
        item = self.items[row]
        self.drop([row])
        return item

    def drop(self, rows: list[int]) -> None:
        """Take prompts out by their rows; the last prompts move to where they were."""
        for row in sorted(rows, reverse=True):
            del self._rows[self._ids[row]]
            item, request_id = self.items.pop(), self._ids.pop()
            last = len(self.items)
            if row < last:
                self._columns[:, row] = self._columns[:, last]
                self.items[row], self._ids[row] = item, request_id
                self._rows[request_id] = row

    def clear(self) -> None:
        """Forget all."""
        self.items.clear()
        self._ids.clear()
        self._rows.clear()

    def advance(self, row: int, num_done: int) -> None:
        """Note how far a prompt is computed."""
        self._columns[DONE, row] = num_done
        self._columns[DONE_S, row] = self._table.at(num_done)

    def urgency(self, now_s: float) -> Urgency:
        """What the policy sees of each row.

        Args:
            now_s: seconds on the clock of arrivals.
        """
        live = self._columns[:, : len(self.items)]
        if self._version != self._table.version:
            self._version = self._table.version
            live[TOTAL_S] = self._table.until(live[LENGTH])
            live[DONE_S] = self._table.until(live[DONE])
        factor = self._table.factor()
        total_s = live[TOTAL_S] * factor
        slack_s = live[DUE] - now_s - (total_s - live[DONE_S] * factor)
        return Urgency(live[ARRIVAL], live[DUE], total_s, slack_s)

    def in_order(self, urgency: Urgency, among: np.ndarray | None = None) -> Iterator[int]:
        """Rows, the most urgent first: by priority, policy, then as they came.

        They are put in order few by few, for a reader who stops early.

        Args:
            urgency: as it is now.
            among: bool ``[B]``, the rows that are asked for; unset: all.
        """
        rows, turns = np.arange(len(self.items)), self.column(TURN)
        keys, classes = self._policy(urgency), self.column(PRIORITY)
        if among is not None:
            rows, keys, classes, turns = rows[among], keys[among], classes[among], turns[among]
        while len(rows) > FEW:
            is_next = _first_few(keys, classes)
            (few,) = is_next.nonzero()
            assert len(few), "an urgency is a number"
            yield from rows[few[np.lexsort((turns[few], keys[few], classes[few]))]].tolist()
            later = ~is_next
            rows, keys, classes, turns = rows[later], keys[later], classes[later], turns[later]
        yield from rows[np.lexsort((turns, keys, classes))].tolist()

    def column(self, index: int) -> np.ndarray:
        """One quantity of all rows, such as ``LENGTH``: float64 ``[B]``."""
        return self._columns[index, : len(self.items)]


def _first_few(keys: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Rows that come before all others, those of the same class and key together: bool ``[B]``."""
    is_next: np.ndarray = classes == classes.min()
    some = slice(None, None, len(keys) // FEW)
    sample = keys[some][is_next[some]]
    if len(sample) > 1:  # any bound is right, this one leaves few
        is_next &= keys <= np.partition(sample, 1)[1]
    return is_next
