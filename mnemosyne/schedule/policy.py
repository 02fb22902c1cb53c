"""The order of prompts: fcfs, edf, lrs, lars. A policy turns urgency into a sort key.

Times are seconds. The smallest key goes first; requests of a lower ``priority`` number always go
before those of a higher one, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from mnemosyne.config import POLICIES as POLICY_NAMES

Number = TypeVar("Number", float, np.ndarray)
MIN_S = 1e-200  # makes a difference to no predicted time but zero, by which nothing is divided


@dataclass(slots=True, eq=False)
class Urgency(Generic[Number]):
    """The urgency of one request, or of many at once: floats or float64 ``[B]``."""

    arrival_s: Number
    due_s: Number  # arrival and deadline together
    total_s: Number  # of the whole prefill, alone, by the table of prefill times
    done_s: Number  # of the part that is planned


def slack_s(urgency: Urgency[Number], now_s: float, factor: float) -> Number:
    """Seconds to spare before it is due, if it were prefilled alone from now on.

    Args:
        urgency: of one request or many.
        now_s: seconds on the clock of arrivals.
        factor: from seconds of the table to seconds as the machine is now.
    """
    return urgency.due_s - now_s - (urgency.total_s * factor - urgency.done_s * factor)


def relative_slack(urgency: Urgency[Number], now_s: float, factor: float) -> Number:
    """Slack as a share of the whole work: what a long and a short request can be compared by.

    A late request is weighed as if none of it were done. Otherwise late requests of one length
    would take turns, none gaining on another, and all of them would end last; this way they end
    one by one, in the order of their deadlines.

    Source: Medha, arXiv 2409.17264, section 4, for those that are not late.
    """
    done_s = urgency.done_s * factor
    total_s = urgency.total_s * factor
    slack = urgency.due_s - now_s
    slack -= total_s - done_s
    if isinstance(slack, np.ndarray):  # a product with truth values takes twice as long as all this
        np.copyto(slack, slack - done_s, where=slack < 0)
    elif slack < 0:
        slack -= done_s
    slack /= total_s + MIN_S
    return slack


@dataclass(frozen=True, slots=True)
class Policy:
    """An order in which requests are let in and prefilled.

    Args:
        key: from urgency, seconds now and the table's factor to a sort key, for one request or
            for many alike.
        lets_pass: whether a request that fits the free pages passes one that does not.
    """

    key: Callable[[Urgency[Any], float, float], Any]
    lets_pass: bool = True


FCFS, EDF, LRS, LARS = POLICY_NAMES
POLICIES = {
    FCFS: Policy(lambda urgency, now_s, factor: urgency.arrival_s, lets_pass=False),
    EDF: Policy(lambda urgency, now_s, factor: urgency.due_s),
    LRS: Policy(slack_s),
    LARS: Policy(relative_slack),
}
