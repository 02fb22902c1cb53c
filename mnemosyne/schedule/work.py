"""The physical size of a step, from which its time is predicted, counted for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.plan import Chunk


@dataclass(slots=True)
class StepWork:
    """The work of one group in a step; its time is linear in this.

    Attributes:
        num_tokens: rows through the linear layers.
        prefill_pairs: query-key pairs of prefill chunks, averaged over layers.
        decode_keys: keys that decodes read, averaged over layers.
        num_sequences: sequences in the batch.
        num_sampled: rows through the vocabulary head.
        num_exchanged: rows whose partial attention is merged across groups.
        unread: share of the experts that no row asks for; 1 where each row asks for all weights,
            whose reading is part of the fixed cost of a step.
    """

    num_tokens: int = 0
    prefill_pairs: float = 0.0
    decode_keys: float = 0.0
    num_sequences: int = 0
    num_sampled: int = 0
    num_exchanged: int = 0
    unread: float = 1.0

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.num_tokens + other.num_tokens,
            self.prefill_pairs + other.prefill_pairs,
            self.decode_keys + other.decode_keys,
            self.num_sequences + other.num_sequences,
            self.num_sampled + other.num_sampled,
            self.num_exchanged + other.num_exchanged,
            self.unread * other.unread,
        )

    def features(self) -> tuple[float, ...]:
        """The work as a vector, after a one for the fixed cost of a step."""
        return (
            1.0,
            self.num_tokens,
            self.prefill_pairs,
            self.decode_keys,
            self.num_sequences,
            self.num_sampled,
            self.num_exchanged,
            1.0 - self.unread,
        )

    def seconds(self, rates: Sequence[float]) -> float:
        """The sum of ``features``, each times its rate; spelled out, as decisions wait for it."""
        step, token, pair, key, sequence, sampled, exchanged, experts = rates
        return (
            step
            + token * self.num_tokens
            + pair * self.prefill_pairs
            + key * self.decode_keys
            + sequence * self.num_sequences
            + sampled * self.num_sampled
            + exchanged * self.num_exchanged
            + experts * (1.0 - self.unread)
        )


Work = tuple[StepWork, ...]  # of a step, by group


class WorkModel:
    """Counts work for a model whose layers may have sliding windows.

    The groups of a step work side by side: its work is a tuple with one entry per group, and it
    takes as long as the slowest of them.

    Args:
        windows: the window of each layer in tokens, None where a layer sees everything.
        num_groups: degree of the kvp axis.
        unread_share: ``unread`` of one row; rows choose their experts independently.
    """

    def __init__(
        self, windows: Sequence[int | None], num_groups: int = 1, *, unread_share: float = 1.0
    ) -> None:
        counts: dict[int | None, int] = {}
        for window in windows:
            counts[window] = counts.get(window, 0) + 1
        # the windows there are, and the share of the layers that have each
        self.shares = [(window, count / len(windows)) for window, count in counts.items()]
        self._sees_all = set(counts) == {None}
        self.unread_share = unread_share
        self.nothing: Work = (StepWork(),) * num_groups

    def chunk(
        self,
        start: int,
        num_tokens: int,
        *,
        samples: bool,
        is_decode: bool,
        keys: range | None = None,
        is_shared: bool = False,
    ) -> StepWork:
        """The work of ``num_tokens`` rows, the first at position ``start``, over local keys.

        Args:
            start: position of the first row.
            num_tokens: rows.
            samples: whether the last row is sampled.
            is_decode: whether its keys count as read by a decode.
            keys: positions of the local keys; unset: all up to the last row.
            is_shared: whether other groups compute the same rows over other keys.
        """
        pairs = self._pairs(start, num_tokens, keys)
        return StepWork(
            num_tokens,
            0.0 if is_decode else pairs,
            pairs if is_decode else 0.0,
            1,
            int(samples),
            num_tokens if is_shared else 0,
            self.unread_share**num_tokens,
        )

    def with_prefill(
        self, part: StepWork, start: int, num_tokens: int, samples: bool, keys: range | None
    ) -> StepWork:
        """The work of a group with one more prefill chunk: ``part + chunk(...)``, in one go.

        Args:
            part: the work without it.
            start: position of the first row.
            num_tokens: rows.
            samples: whether the last row is sampled.
            keys: positions of the local keys if other groups compute the same rows over other
                keys; unset: all up to the last row.
        """
        if keys is None and self._sees_all:  # as in ``_pairs``, without the call
            pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
        else:
            pairs = self._pairs(start, num_tokens, keys)
        unread = part.unread
        if self.unread_share < 1.0:
            unread *= self.unread_share**num_tokens
        return StepWork(
            part.num_tokens + num_tokens,
            part.prefill_pairs + pairs,
            part.decode_keys,
            part.num_sequences + 1,
            part.num_sampled + samples,
            part.num_exchanged if keys is None else part.num_exchanged + num_tokens,
            unread,
        )

    def add(self, work: Work, chunk: Chunk, table: PageTable) -> Work:
        """The work of a step with one more chunk: each group that holds keys computes its rows."""
        total = list(work)
        holding = table.lane(chunk.group).holding(chunk.stop)
        for extent, positions in holding:
            total[extent.group] += self.chunk(
                chunk.start,
                chunk.num_tokens,
                samples=chunk.samples,
                is_decode=chunk.is_decode,
                keys=positions,
                is_shared=len(holding) > 1,
            )
        return tuple(total)

    def _pairs(self, start: int, num_tokens: int, keys: range | None) -> float:
        """Local keys seen, summed over rows and averaged over layers."""
        if keys is None and self._sees_all:
            return num_tokens * start + num_tokens * (num_tokens + 1) / 2
        local = range(start + num_tokens) if keys is None else keys
        return sum(
            share * _pairs(start, num_tokens, local, window) for window, share in self.shares
        )


class DecodeTally:
    """The work of decodes that may run together, kept up to date as they come and go.

    It counts whole numbers only, so that what came and went leaves nothing behind.

    Args:
        model: counts the work of one.
    """

    def __init__(self, model: WorkModel) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        num_groups = len(self._model.nothing)
        self._counts = [0] * num_groups
        self._exchanged = [0] * num_groups
        self._keys = [[0] * len(self._model.shares) for _ in range(num_groups)]  # by window

    def add(self, rows: Sequence[tuple[int, PageTable]], sign: int = 1) -> None:
        """Take decodes in.

        Args:
            rows: position and page table of each.
            sign: -1 to take them out again.
        """
        # nearly all are whole on one group, and there may be a thousand: these are summed at once
        if len(self._counts) == 1:
            self._add_whole(0, [position + 1 for position, _ in rows], sign)
            return
        whole: list[list[int]] = [[] for _ in self._counts]
        for position, table in rows:
            if len(table.extents) == 1:
                whole[table.extents[0].group].append(position + 1)
            else:
                self._add_shared(position + 1, table, sign)
        for group, stops in enumerate(whole):
            self._add_whole(group, stops, sign)

    def _add_whole(self, group: int, stops: list[int], sign: int) -> None:
        """Decodes whose keys, so many of each, are all on one group."""
        self._counts[group] += sign * len(stops)
        for index, (window, _) in enumerate(self._model.shares):
            seen = stops if window is None else [min(stop, window) for stop in stops]
            self._keys[group][index] += sign * sum(seen)

    def _add_shared(self, stop: int, table: PageTable, sign: int) -> None:
        """A decode over ``stop`` keys on as many groups as hold one."""
        holding = table.holding(stop)
        for extent, held in holding:
            group = extent.group
            self._counts[group] += sign
            self._exchanged[group] += sign * (len(holding) > 1)
            for index, (window, _) in enumerate(self._model.shares):
                first = held.start if window is None else max(held.start, stop - window)
                self._keys[group][index] += sign * max(0, held.stop - first)

    def work(self) -> Work:
        """The work of a step that holds all of them and nothing else, by group."""
        parts = []
        for count, keys, exchanged in zip(self._counts, self._keys, self._exchanged, strict=True):
            seen = 0.0
            for (_, share), number in zip(self._model.shares, keys, strict=True):
                seen += share * number
            unread = self._model.unread_share**count
            parts.append(StepWork(count, 0.0, seen, count, count, exchanged, unread))
        return tuple(parts)


def _pairs(start: int, num_tokens: int, keys: range, window: int | None) -> float:
    """Keys seen, summed over rows at positions ``start .. start + num_tokens - 1``."""
    seen = _clipped_sum(start + 1, num_tokens, keys.start, keys.stop)
    if window is None:
        return seen - num_tokens * keys.start
    return seen - _clipped_sum(start + 1 - window, num_tokens, keys.start, keys.stop)


def _clipped_sum(first: int, count: int, low: int, high: int) -> float:
    """Sum of ``first .. first + count - 1``, each clipped to [low, high]."""
    num_low = min(max(low - first, 0), count)
    num_high = min(max(first + count - high, 0), count - num_low)
    num_between = count - num_low - num_high
    between = num_between * (first + num_low) + num_between * (num_between - 1) / 2
    return num_low * low + num_high * high + between
