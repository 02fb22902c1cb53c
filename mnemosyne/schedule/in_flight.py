"""Steps in flight, and when the last of them should be done."""

from __future__ import annotations

from mnemosyne.schedule.work import Work


class StepsInFlight:
    """Steps that are planned and not back yet; their work until the predictor has learned from it.

    Args:
        depth: stages that they pass, one behind the other.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._times_s: dict[int, tuple[float, float]] = {}  # by plan: planned at, takes
        self._works: dict[int, Work] = {}  # of plans not yet learned from

    def add(self, index: int, work: Work, now_s: float, seconds: float) -> None:
        """Take in a step that is planned now, and takes so long through stages that are idle."""
        self._times_s[index], self._works[index] = (now_s, seconds), work

    def remove(self, index: int) -> None:
        """Take out a step that is back."""
        del self._times_s[index]

    def take_work(self, index: int) -> Work:
        """Take out the work of a step."""
        return self._works.pop(index)

    def clear(self) -> None:
        """Forget all."""
        self._times_s.clear()
        self._works.clear()

    def done_s(self, now_s: float) -> float:
        """The time when the last of them should leave the last stage; now, if there is none.

        A step leaves it no sooner than the time of one stage behind the step before it.
        """
        done_s = 0.0
        for planned_s, seconds in self._times_s.values():
            done_s = max(planned_s + seconds, done_s + seconds / self._depth)
        return max(now_s, done_s)
