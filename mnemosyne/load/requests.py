"""The requests of a run, the moments they are sent at, and their outcomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mnemosyne.config_client import BenchServeConfig

LOW_ID, HIGH_ID = 10, 250  # ids that every vocabulary has, and that are no special tokens in most


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to come."""

    index: int
    start_s: float  # after the first
    prompt: list[int]
    is_long: bool = False


@dataclass(slots=True)
class Outcome:
    """Outcome of one request. Times are in seconds."""

    index: int
    num_prompt_tokens: int
    is_long: bool
    start_s: float = 0.0
    ttft_s: float | None = None
    tbt_s: list[float] = field(default_factory=list)
    seconds: float = 0.0  # until its end, good or bad
    num_tokens: int = 0
    status: int | None = None  # of HTTP, where it is an error
    error: str | None = None

    @property
    def end(self) -> str:
        """The way it ended: served, refused (by a status of 4xx, or 503) or failed."""
        if self.error is None:
            return "served"
        refused = self.status is not None and (400 <= self.status < 500 or self.status == 503)
        return "refused" if refused else "failed"

    def is_good(self, ttft_s: float, tbt_s: float) -> bool:
        """Tell if it was served within both bounds; a refused or failed one is not."""
        if self.error is not None or self.ttft_s is None or self.ttft_s > ttft_s:
            return False
        return not self.tbt_s or float(np.percentile(self.tbt_s, 99)) <= tbt_s


def planned(config: BenchServeConfig) -> list[Planned]:
    """The requests of a run: the long one first, then the others in order of their coming."""
    rng = np.random.default_rng(config.seed)
    gaps = np.zeros(config.requests)
    if config.rate is not None:
        gaps = rng.exponential(1 / config.rate, config.requests)
    starts = np.cumsum(gaps) - gaps[0]
    lengths = rng.choice(np.array(config.lengths), config.requests)
    made = []
    if config.long is not None:
        made.append(Planned(0, 0.0, ids_of(rng, int(config.long)), is_long=True))
    first = len(made)
    made += [
        Planned(first + index, float(start_s), ids_of(rng, int(length)))
        for index, (start_s, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return made


def ids_of(rng: np.random.Generator, length: int) -> list[int]:
    """A prompt that no cache of prefixes has seen."""
    ids: list[int] = rng.integers(LOW_ID, HIGH_ID, length).tolist()
    return ids
