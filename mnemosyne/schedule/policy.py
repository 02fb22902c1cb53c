"""The order of requests: fcfs, edf, lrs, lars, mlfq. A policy turns urgency into a sort key.

Times are seconds. The smallest key goes first; requests of a lower ``priority`` number always go
before those of a higher one, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, inf, log2
from typing import Any, Generic, TypeVar

import numpy as np

from mnemosyne.config import POLICIES as POLICY_NAMES

Number = TypeVar("Number", float, np.ndarray)
QUANTUM_S = 0.01  # of service at the first level of ``mlfq``; each level has twice that of the last
PATIENCE_S = 3.0  # after which who waits under ``mlfq`` goes first
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


def entry_level(urgency: Urgency[Number], now_s: float, factor: float) -> Any:
    """The level at which a prompt joins: the first whose quantum holds all of its prefill.

    A prompt that waits for longer than that twice, and ``PATIENCE_S``, goes to the first level.

    Source: FastServe, arXiv 2305.05920, skip-join; here without queues, in closed form.
    """
    level = np.ceil(np.log2(np.maximum(urgency.total_s * factor / QUANTUM_S, 1.0)))
    waited_s = now_s - urgency.arrival_s - PATIENCE_S
    return level * (waited_s < 2 * QUANTUM_S * np.exp2(level))


def decode_level(urgency: Urgency[float], served_s: float, factor: float) -> float:
    """The level of a request that was served so long since its prefill.

    It joins at ``e``, and sinks by one whenever it has had a quantum: after ``2^e`` quanta of the
    first level, then twice as many, and so on.

    Source: as for ``entry_level``.
    """
    quanta = urgency.total_s * factor / QUANTUM_S
    joined_at = 0 if quanta <= 1 else -floor(-log2(quanta))
    return floor(log2(served_s / QUANTUM_S + 2**joined_at))


@dataclass(frozen=True, slots=True)
class Policy:
    """An order in which requests are let in and prefilled, and maybe one of decodes.

    Args:
        key: from urgency, seconds now and the table's factor to a sort key, for one request or
            for many alike.
        lets_pass: whether a request that fits the free pages passes one that does not.
        decode_key: from urgency, seconds of decoding and the table's factor to a sort key among
            decodes, of which only those that fit into ``target_tbt`` run; unset: all run.
        patience_s: seconds that a decode is left out before it goes first.
    """

    key: Callable[[Urgency[Any], float, float], Any]
    lets_pass: bool = True
    decode_key: Callable[[Urgency[float], float, float], float] | None = None
    patience_s: float = inf


FCFS, EDF, LRS, LARS, MLFQ = POLICY_NAMES
POLICIES = {
    FCFS: Policy(lambda urgency, now_s, factor: urgency.arrival_s, lets_pass=False),
    EDF: Policy(lambda urgency, now_s, factor: urgency.due_s),
    LRS: Policy(slack_s),
    LARS: Policy(relative_slack),
    MLFQ: Policy(entry_level, decode_key=decode_level, patience_s=PATIENCE_S),
}
