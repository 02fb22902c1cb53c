"""Times in which this process did not run: stopped by a signal, or short of a processor."""

from __future__ import annotations

import time
from collections import deque

LEAST_PAUSE_S = 1.0  # beyond what a busy machine makes of a tick
NUM_KEPT = 64


class Pauses:
    """Noticed by a thread that comes round in every tick: one that took too long was a pause.

    Args:
        tick_s: how long it takes to come round.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._last_s = time.monotonic()
        self._pauses: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)  # end and seconds

    def tick(self) -> None:
        """Called each time round."""
        now_s = time.monotonic()
        seconds = now_s - self._last_s - self._tick_s
        if seconds > LEAST_PAUSE_S:
            self._pauses.append((now_s, seconds))
        self._last_s = now_s

    def since(self, start_s: float) -> float:
        """Seconds of the pauses that ended after a time of ``time.monotonic``."""
        return sum(
            min(seconds, end_s - start_s) for end_s, seconds in self._pauses if end_s > start_s
        )
