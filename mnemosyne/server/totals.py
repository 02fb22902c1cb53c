"""Counters and histograms of an engine since its start, in a form that is sent as numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from mnemosyne.metrics import StepRecord
from mnemosyne.server.backend import Tally

STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RATIO = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5, 2, 4)
TOKENS = tuple(float(2**power) for power in range(5, 22, 2))
SLACK_S = (-3600, -600, -60, -10, -1, 0, 1, 10, 60, 600, 3600)
SHARDS = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """Counts of values by bucket.

    Args:
        bounds: upper ends of the buckets, in order; each belongs to its bucket.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def tally(self) -> Tally:
        return Tally(bounds=self._bounds, counts=tuple(self._counts), total=self._total)


class Totals:
    """Sums over the steps of an engine; its own thread and others update and read them."""

    def __init__(self) -> None:
        self._steps = self._missed = self._prefilled = self._sampled = 0
        self._set_back = self._hits = 0
        self._histograms = {
            "step_seconds": Histogram(STEP_S),
            "step_predicted_ratio": Histogram(RATIO),
            "chunk_tokens": Histogram(TOKENS),
            "slack_seconds": Histogram(SLACK_S),
            "request_groups": Histogram(SHARDS),
        }

    def add(self, record: StepRecord) -> None:
        """Enter a step."""
        self._steps += 1
        self._missed += record.num_missed
        self._prefilled += record.chunk_tokens
        self._sampled += record.num_sampled
        self._set_back += record.num_set_back
        self._hits += sum(num_tokens > 0 for _, num_tokens, _ in record.hits)
        self._histograms["step_seconds"].add(record.actual_s)
        if record.predicted_s > 0:
            self._histograms["step_predicted_ratio"].add(record.actual_s / record.predicted_s)
        for _, _, num_tokens in record.chunks:
            self._histograms["chunk_tokens"].add(num_tokens)
        for slack_s in record.slack_s:
            self._histograms["slack_seconds"].add(slack_s)

    def add_request(self, num_groups: int) -> None:
        """Enter a request whose prefill began, with the groups that hold its cache."""
        self._histograms["request_groups"].add(num_groups)

    def counters(self) -> dict[str, float]:
        return {
            "steps": self._steps,
            "prefilled_tokens": self._prefilled,
            "sampled_tokens": self._sampled,
            "deadline_misses": self._missed,
            "preemptions": self._set_back,
            "cache_hits": self._hits,
        }

    def tallies(self) -> Mapping[str, Tally]:
        return {name: histogram.tally() for name, histogram in self._histograms.items()}
