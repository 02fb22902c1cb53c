"""Claims about decodes of which not all fit into the target."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mnemosyne.schedule.policy import PATIENCE_S, POLICIES, QUANTUM_S, Policy, Urgency, decode_level
from tests.schedule.clocked import Rates, Run, make_request, make_scheduler, serve

TOKEN_S = 1e-3
STEP_S = 48 * TOKEN_S
TARGET_S = (STEP_S + 64 * TOKEN_S) / 2  # half of what a decode of each request takes
NUM_FIT = 8


def _run(policy: str, **more) -> Run:
    """64 requests of 1 to 2,000 output tokens, most of them short."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(0.0, np.log(2000), 64)).astype(int).tolist()
    requests = [make_request(i, 8, length, arrival_s=1e-6 * i) for i, length in enumerate(lengths)]
    config = {"policy": policy, "target_tbt": TARGET_S, "max_sequences": 64} | more
    return serve(make_scheduler(Rates(TOKEN_S, step_s=STEP_S), **config), requests)


def _num_decodes(run: Run) -> list[int]:
    return [sum(chunk.is_decode for chunk in plan.chunks) for plan in run.plans]


def test_under_mlfq_those_that_run_get_their_tokens_within_the_target_and_all_end():
    run = _run("mlfq")

    gaps_s = []
    for before, plan in pairwise(run.plans):
        ran = {chunk.request_id for chunk in before.chunks if chunk.samples}
        again = [c for c in plan.chunks if c.is_decode and c.request_id in ran]
        gaps_s += [plan.predicted_s] * len(again)
    assert np.percentile(gaps_s, 95) <= 1.1 * TARGET_S
    assert max(_num_decodes(run)) == NUM_FIT
    assert len(run.finished_s) == 64


def test_the_mean_time_to_the_last_token_is_lower_than_in_order_of_arrival(monkeypatch):
    mlfq = _run("mlfq")
    by_arrival = Policy(POLICIES["fcfs"].key, decode_key=lambda urgency, *_: urgency.arrival_s)
    monkeypatch.setitem(POLICIES, "fcfs", by_arrival)

    fcfs = _run("fcfs")

    means_s = [np.mean(list(run.finished_s.values())) for run in (fcfs, mlfq)]
    assert max(_num_decodes(fcfs)) == NUM_FIT
    assert means_s[0] >= 1.3 * means_s[1]


def test_a_long_answer_goes_on_beside_a_stream_of_short_ones():
    requests = [make_request(0, 8, 200)]
    requests += [make_request(i, 8, 4, arrival_s=0.01 * i) for i in range(1, 3000)]
    config = {"policy": "mlfq", "target_tbt": TARGET_S, "max_sequences": 64}

    run = serve(make_scheduler(Rates(TOKEN_S, step_s=STEP_S), **config), requests, until_s=30.0)

    ends_s = [
        started_s
        for plan, started_s in zip(run.plans, run.started_s, strict=True)
        if any(chunk.request_id == 0 for chunk in plan.chunks)
    ]
    assert ends_s[-1] > 20.0 or 0 in run.finished_s
    assert max(np.diff(ends_s)) < PATIENCE_S + 10 * TARGET_S


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("lars", {}),
        ("fcfs", {}),
        ("mlfq", {"chunk": 64}),
        ("mlfq", {"target_tbt": STEP_S}),  # it holds not even one
    ],
)
def test_all_decodes_run_otherwise(policy, more):
    assert max(_num_decodes(_run(policy, **more))) > 2 * NUM_FIT


@pytest.mark.parametrize("prefill_s", [0.0, 0.004, 0.01, 0.03, 1.0])
def test_levels_are_those_of_queues_that_count_quanta(prefill_s):
    urgency = Urgency(0.0, 1.0, prefill_s, prefill_s)
    level, left = 0, QUANTUM_S
    while left < prefill_s:  # joins where its prefill is one quantum at most
        level, left = level + 1, 2 * left

    for num_served in range(1, 2000):
        left -= 0.00125
        if left < 1e-9:
            level += 1
            left = QUANTUM_S * 2**level
        assert decode_level(urgency, 0.00125 * num_served + 1e-9, 1.0) == level
