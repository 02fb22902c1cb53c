"""Who is prefilled next: fcfs, edf, lrs, lars. A policy is a function from urgency to a sort key.

Times are seconds. The smallest key goes first; requests of a lower ``priority`` number always go
before those of a higher one, whatever the policy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from mnemosyne.schedule.chunking import solve_lone_chunk

MIN_WORK_S = 1e-9  # a prompt of no predicted work would divide by zero


@dataclass(frozen=True, slots=True)
class Urgency:
    """What a policy may know of a request at one moment, all in seconds."""

    arrival_s: float
    deadline_s: float  # relative to the arrival
    total_s: float  # predicted time of its whole prefill, alone
    remaining_s: float  # of which this is left

    def slack_s(self, now_s: float) -> float:
        """Time to spare before the deadline if it were prefilled alone from now on."""
        return self.arrival_s + self.deadline_s - now_s - self.remaining_s

    def relative_slack(self, now_s: float) -> float:
        """Slack as a share of the whole work: what a long and a short request can be compared by.

        Source: Medha, arXiv 2409.17264, section 4.
        """
        return self.slack_s(now_s) / max(self.total_s, MIN_WORK_S)


Policy = Callable[[Urgency, float], float]

POLICIES: dict[str, Policy] = {
    "fcfs": lambda urgency, now_s: urgency.arrival_s,
    "edf": lambda urgency, now_s: urgency.arrival_s + urgency.deadline_s,
    "lrs": lambda urgency, now_s: urgency.slack_s(now_s),
    "lars": lambda urgency, now_s: urgency.relative_slack(now_s),
}


class PrefillTable:
    """Predicted time of prefilling a prompt alone, by its length.

    The chunk rule runs over the predictor once for each length not seen before; lengths between
    two chunk ends are interpolated. When the machine as a whole becomes slower or faster, the
    table follows by one factor.

    Args:
        predict: seconds of a step with ``num_tokens`` tokens from position ``start``.
        min_chunk: smallest chunk, tokens.
        max_chunk: largest chunk, tokens.
    """

    def __init__(
        self, predict: Callable[[int, int], float], *, min_chunk: int, max_chunk: int
    ) -> None:
        self._predict = predict
        self._min_chunk = min_chunk
        self._max_chunk = max_chunk
        self._ends = [0]  # tokens computed after each chunk
        self._seconds = [0.0]  # time spent until then
        self._reference_s = 0.0

    def seconds(self, done: int, total: int) -> float:
        """Time to prefill tokens ``done`` to ``total`` of a prompt, alone."""
        if self._reference_s <= 0:  # made before the predictor knew anything
            self._ends, self._seconds = [0], [0.0]
        self._extend(total)
        return self._factor() * (self._until(total) - self._until(done))

    def _extend(self, num_tokens: int) -> None:
        while self._ends[-1] < num_tokens:
            start = self._ends[-1]
            chunk = solve_lone_chunk(
                lambda size, start=start: self._predict(start, size),  # type: ignore[misc]
                remaining=2**62,
                min_chunk=self._min_chunk,
                max_chunk=self._max_chunk,
            )
            self._ends.append(start + chunk)
            self._seconds.append(self._seconds[-1] + self._predict(start, chunk))
            if start == 0:
                self._reference_s = self._seconds[-1]

    def _until(self, num_tokens: int) -> float:
        index = bisect_left(self._ends, num_tokens)
        if self._ends[index] == num_tokens:
            return self._seconds[index]
        before, after = self._ends[index - 1], self._ends[index]
        share = (num_tokens - before) / (after - before)
        return self._seconds[index - 1] + share * (self._seconds[index] - self._seconds[index - 1])

    def _factor(self) -> float:
        """How much slower the machine is now than when the table was made."""
        if self._reference_s <= 0:
            return 1.0
        return self._predict(0, self._ends[1]) / self._reference_s
