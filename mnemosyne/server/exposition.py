"""Metrics: what the HTTP side counts itself, beside what the engine tells, for Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from mnemosyne.server.answer import Answer
from mnemosyne.server.backend import Status, Tally
from mnemosyne.server.totals import TOKENS, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# to hours: a prompt of millions of tokens takes some
TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600, 14400)
TBT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 5, 30)

GAUGES: dict[str, tuple[str, Callable[[Status], float]]] = {
    "ready": ("1 while requests are taken", lambda s: s.is_ready),
    "heartbeat_age_seconds": ("Since the engine's loop last turned", lambda s: s.heartbeat_age_s),
    "requests_running": ("Requests that hold pages", lambda s: s.num_running),
    "requests_waiting": ("Requests that wait for pages", lambda s: s.num_waiting),
    "cache_pages_used": ("Pages of the KV cache in use", lambda s: s.pages_used),
    "cache_pages": ("Pages of the KV cache", lambda s: s.num_pages),
    "cache_use_ratio": ("Share of the pages in use", lambda s: s.pages_used / max(1, s.num_pages)),
    "backlog_seconds": ("Predicted time of all prefill ahead", lambda s: s.backlog_s),
}
COUNTERS = {
    "steps": "Steps of the engine",
    "prefilled_tokens": "Prompt tokens computed",
    "sampled_tokens": "Rows that got logits",
    "deadline_misses": "First tokens that came after their deadlines",
    "preemptions": "Requests that gave their pages up, to be computed again",
    "cache_hits": "Requests whose prompts began with a cached prefix",
    "cache_restored_tokens": "Prompt tokens that came from cache.dir",
    "cache_written_bytes": "Bytes that rank 0 wrote to cache.dir",
    "cache_read_bytes": "Bytes that rank 0 read of cache.dir",
    "cache_refused_files": "Files of cache.dir that rank 0 refused and removed",
    "cache_skipped_leaves": "Leaves that were not written to cache.dir",
    "engine_deaths": "Engines that died under the server",
    "resumed_requests": "Requests given to a new engine after a death",
    "condemned_requests": "Requests refused for an hour: they were there at two deaths",
}
TALLIES = {
    "step_seconds": "Time of steps",
    "step_predicted_ratio": "Actual over predicted time of steps",
    "chunk_tokens": "Sizes of chunks of prefill",
    "slack_seconds": "Time that prompts being prefilled had left to their deadlines",
    "request_groups": "Groups that hold the cache of a request",
}
OWN = {
    "time_to_first_token_seconds": ("From the request's last byte to its first token", TTFT_S),
    "time_between_tokens_seconds": ("Between tokens of a choice", TBT_S),
    "request_seconds": ("From the request's last byte to the answer's", TTFT_S),
    "request_prompt_tokens": ("Tokens of prompts", TOKENS),
    "request_output_tokens": ("Tokens of answers", TOKENS),
}


class Timer:
    """Times the tokens of one answer.

    Args:
        totals: where they are counted.
        clock: seconds.
    """

    def __init__(self, totals: HttpTotals, clock: Callable[[], float] = time.monotonic) -> None:
        self._totals, self._clock = totals, clock
        self._started_s = clock()
        self._last_s: dict[int, float] = {}  # by choice

    def note(self, choice: int, num_tokens: int) -> None:
        """Enter tokens of a choice that came together."""
        if not num_tokens:
            return
        now_s = self._clock()
        if choice not in self._last_s:
            self._totals.add("time_to_first_token_seconds", now_s - self._started_s)
        else:
            gap_s = (now_s - self._last_s[choice]) / num_tokens
            self._totals.add("time_between_tokens_seconds", gap_s)
        self._last_s[choice] = now_s

    def end(self, answer: Answer) -> None:
        """Enter the whole answer."""
        self._totals.add("request_seconds", self._clock() - self._started_s)
        self._totals.add("request_output_tokens", answer.num_output_tokens)
        self._totals.count("generated_tokens", answer.num_output_tokens)
        self._totals.count("cached_tokens", answer.num_cached_tokens)


class HttpTotals:
    """Counts of the HTTP side."""

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in OWN.items()}
        self._counts: Counter[str] = Counter()
        self._responses: Counter[tuple[str, str]] = Counter()
        self._ended: Counter[str] = Counter()

    def add(self, name: str, value: float) -> None:
        self._histograms[name].add(value)

    def count(self, name: str, number: int) -> None:
        self._counts[name] += number

    def count_response(self, route: str, status: int) -> None:
        self._responses[route, str(status)] += 1

    def count_end(self, outcome: str) -> None:
        """Enter how an answer ended: finished, failed, left, stalled or cancelled."""
        self._ended[outcome] += 1

    def accept(self, answer: Answer) -> None:
        self._counts["prompt_tokens"] += answer.num_prompt_tokens
        for num_tokens in answer.inquiry.num_tokens:
            self.add("request_prompt_tokens", num_tokens)

    def metrics(self) -> Iterator[Metric]:
        for name, (about, _) in OWN.items():
            yield _histogram(name, about, self._histograms[name].tally())
        for name in ("prompt_tokens", "generated_tokens", "cached_tokens"):
            about = f"{name.partition('_')[0].capitalize()} tokens of accepted requests"
            yield CounterMetricFamily(f"mnemosyne_{name}", about, value=self._counts[name])
        responses = CounterMetricFamily(
            "mnemosyne_responses", "Responses by route and status", labels=("route", "status")
        )
        for labels, number in self._responses.items():
            responses.add_metric(labels, number)
        yield responses
        ended = CounterMetricFamily("mnemosyne_answers", "Answers by end", labels=("end",))
        for outcome, number in self._ended.items():
            ended.add_metric([outcome], number)
        yield ended


class Exposition:
    """The page ``/metrics``; every scrape asks anew.

    Args:
        totals: of the HTTP side.
        status: of the engine.
        running: answers that are being written.
    """

    def __init__(
        self,
        totals: HttpTotals,
        status: Callable[[], Status],
        running: Callable[[], list[Answer]],
    ) -> None:
        self._totals, self._status, self._running = totals, status, running
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics, as the registry asks for them."""
        yield from self._totals.metrics()
        yield from self._progress()
        status = self._status()
        for name, (about, value) in GAUGES.items():
            yield GaugeMetricFamily(f"mnemosyne_{name}", about, value=float(value(status)))
        for name, about in COUNTERS.items():
            number = status.counters.get(name, 0.0)
            yield CounterMetricFamily(f"mnemosyne_{name}", about, value=number)
        empty = Tally(bounds=(1.0,), counts=(0, 0), total=0.0)
        for name, about in TALLIES.items():
            yield _histogram(name, about, status.tallies.get(name, empty))

    def _progress(self) -> Iterator[Metric]:
        """How far the prompts are that are being computed."""
        left = [(a.num_prefilled, a.num_prompt_tokens) for a in self._running()]
        shares = [done / total for done, total in left if done < total]
        yield GaugeMetricFamily(
            "mnemosyne_prefill_tokens_left",
            "Prompt tokens that are not computed yet",
            value=sum(total - done for done, total in left),
        )
        yield GaugeMetricFamily(
            "mnemosyne_prefill_least_progress_ratio",
            "Share computed of the prompt that is least far; 1 where none is computed",
            value=min(shares, default=1.0),
        )


def _histogram(name: str, about: str, tally: Tally) -> Metric:
    buckets, so_far = [], 0
    bounds = [*(f"{bound:g}" for bound in tally.bounds), "+Inf"]
    for bound, count in zip(bounds, tally.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return HistogramMetricFamily(f"mnemosyne_{name}", about, buckets=buckets, sum_value=tally.total)
