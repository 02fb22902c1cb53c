"""Who is prefilled next: fcfs, edf, lrs, lars. A policy is a function from urgency to a sort key.

Times are seconds. The smallest key goes first; requests of a lower ``priority`` number always go
before those of a higher one, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MIN_WORK_S = 1e-9  # a prompt of no predicted work would divide by zero


@dataclass(frozen=True, slots=True, eq=False)
class Urgency:
    """What a policy may know of requests at one moment: float64 ``[B]`` each, all in seconds."""

    arrival_s: np.ndarray
    due_s: np.ndarray  # arrival and deadline together
    total_s: np.ndarray  # predicted time of the whole prefill, alone
    remaining_s: np.ndarray  # of which this is left

    def slack_s(self, now_s: float) -> np.ndarray:
        """Time to spare before the deadline if it were prefilled alone from now on."""
        return self.due_s - now_s - self.remaining_s

    def relative_slack(self, now_s: float) -> np.ndarray:
        """Slack as a share of the whole work: what a long and a short request can be compared by.

        Source: Medha, arXiv 2409.17264, section 4.
        """
        return self.slack_s(now_s) / np.maximum(self.total_s, MIN_WORK_S)


Policy = Callable[[Urgency, float], np.ndarray]

POLICIES: dict[str, Policy] = {
    "fcfs": lambda urgency, now_s: urgency.arrival_s,
    "edf": lambda urgency, now_s: urgency.due_s,
    "lrs": lambda urgency, now_s: urgency.slack_s(now_s),
    "lars": lambda urgency, now_s: urgency.relative_slack(now_s),
}
