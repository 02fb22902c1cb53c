"""Claims about the table of prompts: its order is that of a plain sort, whoever came and left."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.schedule.policy import POLICIES
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.prompts import Prompts
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


def _filled(fields: list[dict], policy: str) -> Prompts[int]:
    """A table of prompts named by their turns, without those that left."""
    table = PrefillTable(lambda start, size: 1e-3 * size, min_chunk=1, max_chunk=8)
    table.extend(8)
    waiting: Prompts[int] = Prompts(POLICIES[policy], table)
    for turn, each in enumerate(fields):
        request = make_request(
            turn, each["length"], arrival_s=each["arrival_s"], priority=each["priority"]
        )
        waiting.add(request, turn, due_s=each["due_s"])
    for turn, each in enumerate(fields):
        if each["leaves"]:
            assert waiting.discard(turn) == turn
    return waiting


def _plain_key(each: dict, policy: str) -> float:
    alone_s = 1e-3 * each["length"]
    slack_s = each["due_s"] - NOW_S - alone_s
    keys = {"fcfs": each["arrival_s"], "edf": each["due_s"], "lrs": slack_s}
    return keys.get(policy, slack_s / alone_s)


@settings(max_examples=100, deadline=None)
@given(fields=prompts, policy=st.sampled_from(sorted(POLICIES)), picks=st.randoms())
def test_the_order_is_that_of_a_plain_sort(fields, policy, picks):
    waiting = _filled(fields, policy)
    asked = [picks.random() < 0.7 for _ in waiting.items]
    staying = [turn for turn, each in enumerate(fields) if not each["leaves"]]

    everyone = [waiting.items[row] for row in waiting.in_order(waiting.urgency(NOW_S))]
    some = list(waiting.in_order(waiting.urgency(NOW_S), np.array(asked, dtype=bool)))

    assert everyone == sorted(
        staying, key=lambda t: (fields[t]["priority"], _plain_key(fields[t], policy), t)
    )
    rows = {turn: row for row, turn in enumerate(waiting.items)}
    assert some == [rows[turn] for turn in everyone if asked[rows[turn]]]
