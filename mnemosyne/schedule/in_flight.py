"""Steps in flight, and when the last of them should be done."""

from __future__ import annotations


class StepsInFlight:
    """Steps that are planned and not back yet.

    Args:
        depth: stages that they pass, one behind the other.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._times_s: dict[int, tuple[float, float]] = {}  # by plan: planned at, takes

    def add(self, index: int, now_s: float, seconds: float) -> None:
        """Take in a step that is planned now, and takes so long through stages that are idle."""
        self._times_s[index] = now_s, seconds

    def remove(self, index: int) -> None:
        """Take out a step that is back."""
        del self._times_s[index]

    def clear(self) -> None:
        """Forget all."""
        self._times_s.clear()

    def done_s(self, now_s: float) -> float:
        """When the last of them should leave the last stage; now, if there is none.

        A step leaves it no sooner than the time of one stage behind the step before it.
        """
        done_s = 0.0
        for planned_s, seconds in self._times_s.values():
            done_s = max(planned_s + seconds, done_s + seconds / self._depth)
        return max(now_s, done_s)
