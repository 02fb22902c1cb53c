"""Who is prefilled next: fcfs, edf, lrs, lars. A policy is a function from urgency to a sort key.

Times are seconds. The smallest key goes first; requests of a lower ``priority`` number always go
before those of a higher one, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

MIN_WORK_S = 1e-9  # a prompt of no predicted work would divide by zero


@dataclass(slots=True, eq=False)
class Urgency:
    """What a policy may know of requests at one moment: float64 ``[B]`` each, all in seconds."""

    arrival_s: np.ndarray
    due_s: np.ndarray  # arrival and deadline together
    total_s: np.ndarray  # predicted time of the whole prefill, alone
    slack_s: np.ndarray  # to spare before it is due if it were prefilled alone from now on

    def relative_slack(self, row: int | EllipsisType = ...) -> np.ndarray:
        """Slack as a share of the whole work: what a long and a short request can be compared by.

        Args:
            row: of one request; unset: of all.

        Source: Medha, arXiv 2409.17264, section 4.
        """
        return self.slack_s[row] / np.maximum(self.total_s[row], MIN_WORK_S)


Policy = Callable[[Urgency], np.ndarray]

POLICIES: dict[str, Policy] = {
    "fcfs": lambda urgency: urgency.arrival_s,
    "edf": lambda urgency: urgency.due_s,
    "lrs": lambda urgency: urgency.slack_s,
    "lars": lambda urgency: urgency.relative_slack(),
}
