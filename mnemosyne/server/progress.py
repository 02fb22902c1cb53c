"""The progress of the prompts of a request, and the time that the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mnemosyne.server.answer import Answer
from mnemosyne.server.backend import Status

Curve = tuple[tuple[int, float], ...]


class PromptProgress:
    """Progress as clients show it; names as in llama.cpp, ``seconds_left`` is ours.

    Args:
        answer: whose prompts are computed.
        status: of the engine.
        clock: seconds.
    """

    def __init__(
        self,
        answer: Answer,
        status: Callable[[], Status],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answer, self._status, self._clock = answer, status, clock
        self._started_s = clock()

    def told(self) -> dict[str, Any]:
        """The object ``prompt_progress``."""
        answer, spent_s = self._answer, self._clock() - self._started_s
        total, done = answer.num_prompt_tokens, answer.num_prefilled
        left_s = seconds_left(
            self._status().prefill_curve, spent_s, done - answer.num_cached_tokens, done, total
        )
        return {
            "total": total,
            "cache": answer.num_cached_tokens,
            "processed": done,
            "time_ms": round(1000 * spent_s),
            "seconds_left": left_s if left_s is None else round(left_s, 1),
        }


def seconds_left(
    curve: Curve, spent_s: float, num_computed: int, done: int, total: int
) -> float | None:
    """Time until a prompt is prefilled, None where it is unknown.

    What the engine predicts for it alone is scaled by how much longer the part that is done took,
    since others share its steps.

    Args:
        curve: predicted seconds by length.
        spent_s: seconds since the request came.
        num_computed: tokens of it that were computed in that time.
        done: tokens that are there, those of the cache included.
        total: of the prompt.
    """
    if done >= total:
        return 0.0
    rest_s = at(curve, total) - at(curve, done)
    predicted_s = at(curve, done) - at(curve, done - num_computed)
    if num_computed > 0 and predicted_s > 0:
        return rest_s * spent_s / predicted_s
    if num_computed > 0:
        return spent_s * (total - done) / num_computed
    return rest_s or None


def at(curve: Curve, length: int) -> float:
    """The predicted time of a length: between two points along a line, beyond the last one too."""
    low, low_s = 0, 0.0
    for high, high_s in curve:
        if length <= high or high == curve[-1][0]:
            return low_s + (high_s - low_s) * (length - low) / (high - low)
        low, low_s = high, high_s
    return 0.0
