"""Claims about the table of prompts: its order is that of a plain sort, whoever came and left."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.schedule.policy import POLICIES, Policy
from mnemosyne.schedule.prefill_queue import PrefillQueue
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.request_state import RequestState
from tests.schedule.clocked import make_request

NOW_S = 3.0

prompts = st.lists(
    st.fixed_dictionaries(
        {
            "length": st.integers(1, 4),  # few values: many keys are the same
            "arrival_s": st.sampled_from([0.0, 1.0, 2.0]),
            "due_s": st.sampled_from([2.0, 4.0, 9.0]),
            "priority": st.sampled_from([0, 0, 0, 1, 7]),
            "leaves": st.booleans(),
        }
    ),
    max_size=120,
)


def _filled(fields: list[dict], policy: Policy) -> PrefillQueue:
    """Prompts named by their tickets, without those that left."""
    table = PrefillTable(
        lambda start, size: size, lambda size: 1e-3 * size, min_chunk=1, max_chunk=8
    )
    table.extend(8)
    waiting, everyone = PrefillQueue(policy, table), []
    for ticket, each in enumerate(fields):
        length = each["length"]
        request = make_request(
            ticket,
            length,
            max_tokens=length,
            arrival_s=each["arrival_s"],
            priority=each["priority"],
        )
        prompt = RequestState(
            *(request.arrival_s, each["due_s"], table.at(length), 0.0, request),
            deadline_s=1.0,
            num_needed=request.max_tokens,
        )
        waiting.add(prompt)
        everyone.append(prompt)
    for prompt, each in zip(everyone, fields, strict=True):
        if each["leaves"]:
            waiting.remove([prompt])
    return waiting


def _tickets(prompts: Iterable[RequestState]) -> list[int]:
    return [prompt.request.request_id for prompt in prompts]


def _plain_key(each: dict, policy: str) -> float:
    alone_s = 1e-3 * each["length"]
    slack_s = each["due_s"] - NOW_S - alone_s
    keys = {"fcfs": each["arrival_s"], "edf": each["due_s"], "lrs": slack_s}
    return keys.get(policy, slack_s / alone_s)


def _sorted(fields: list[dict], policy: str, tickets: Iterable[int]) -> list[int]:
    return sorted(tickets, key=lambda t: (fields[t]["priority"], _plain_key(fields[t], policy), t))


@settings(max_examples=100, deadline=None)
@given(fields=prompts, policy=st.sampled_from(sorted(POLICIES)), max_tokens=st.integers(2, 8))
def test_the_order_is_that_of_a_plain_sort(fields, policy, max_tokens):
    waiting = _filled(fields, POLICIES[policy])
    staying = [ticket for ticket, each in enumerate(fields) if not each["leaves"]]
    factor = waiting.follow_table()

    everyone = _tickets(waiting.in_order(NOW_S, factor))
    some = _tickets(waiting.in_order(NOW_S, factor, max_tokens))

    assert everyone == _sorted(fields, policy, staying)
    assert some == [ticket for ticket in everyone if 2 * fields[ticket]["length"] <= max_tokens]


@settings(max_examples=100, deadline=None)
@given(
    fields=prompts,
    policy=st.sampled_from(sorted(POLICIES)),
    taken=st.lists(st.integers(0, 20), max_size=20),
)
def test_the_order_stays_that_of_a_plain_sort_while_the_first_ones_leave(fields, policy, taken):
    waiting = _filled(fields, POLICIES[policy])
    left = [ticket for ticket, each in enumerate(fields) if not each["leaves"]]

    for count in taken:
        left = _sorted(fields, policy, left)
        first = list(islice(waiting.in_order(NOW_S, waiting.follow_table()), count))
        waiting.remove(first)

        assert _tickets(first) == left[:count]
        left = left[count:]
    assert len(waiting) == len(left)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, np.finfo(np.float64).max])
@pytest.mark.parametrize("count", [3, 20, 60])
def test_each_prompt_comes_once_whatever_its_key(odd, count):
    each = {"length": 2, "arrival_s": 0.0, "due_s": 1.0, "leaves": False}
    fields = [each | {"priority": ticket % 2, "length": 1 + ticket % 4} for ticket in range(count)]

    waiting = _filled(fields, Policy(lambda urgency, now_s, factor: urgency.due_s * odd))
    factor = waiting.follow_table()

    assert sorted(_tickets(waiting.in_order(NOW_S, factor))) == list(range(count))
    small = [ticket for ticket in range(count) if fields[ticket]["length"] < 3]
    assert sorted(_tickets(waiting.in_order(NOW_S, factor, 4))) == small
