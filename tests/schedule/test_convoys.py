"""Workloads on which the policies differ, served to the end by the real scheduler on a clock."""

from __future__ import annotations

import pytest

from mnemosyne.request import Request
from tests.schedule.clocked import Rates, make_request, make_scheduler, serve

MS_PER_TOKEN = Rates(1e-3)


def _late(policy: str, requests: list[Request], **config) -> dict[int, float]:
    """Seconds that the first token of each request came after its deadline, at least 0."""
    config = {"policy": policy, "target_tbt": 0.1, "long_tokens": 5000, **config}
    run = serve(make_scheduler(MS_PER_TOKEN, **config), requests)
    return {
        r.request_id: max(0.0, run.first_token_s[r.request_id] - r.arrival_s - r.deadline_s)
        for r in requests
    }


def _medha() -> list[Request]:
    """One long prefill of 10 s due after 16 s; two short ones of 0.5 s come at 5 s, due after 1."""
    return [
        make_request(0, 10_000, 1, deadline_s=16.0),
        make_request(1, 500, 1, arrival_s=5.0, deadline_s=1.0),
        make_request(2, 500, 1, arrival_s=5.0, deadline_s=1.0),
    ]


@pytest.mark.parametrize(("policy", "late_s"), [("edf", 0.15), ("lrs", 0.15), ("lars", 0.35)])
def test_short_requests_preempt_a_long_one_that_has_time(policy, late_s):
    """The short ones fill the second until both are due, so a step under way makes one late.

    Source: Medha, arXiv 2409.17264v5, section 4.1.
    """
    late = _late(policy, _medha(), max_relative_slack=0.0)

    assert late[0] == 0.0
    assert max(late.values()) < late_s


def test_under_fcfs_the_short_ones_wait_for_the_whole_long_one():
    late = _late("fcfs", _medha(), max_relative_slack=0.0)

    assert late == {0: 0.0, 1: pytest.approx(4.5, abs=0.1), 2: pytest.approx(5.0, abs=0.1)}


def test_what_a_long_one_with_slack_gives_up_helps_even_under_fcfs():
    late = _late("fcfs", _medha(), max_relative_slack=0.4)

    assert max(late.values()) < 1.0


def test_a_preempted_prefill_loses_nothing():
    run = serve(make_scheduler(MS_PER_TOKEN, target_tbt=0.1, long_tokens=5000), _medha())

    assert run.first_token_s[0] == pytest.approx(11.0, abs=0.1)


def _one_long_one_that_is_lost() -> list[Request]:
    """A prefill of 20 s that was due after 4, and a stream of short ones of 0.1 s behind it.

    It comes first by its deadline and by its slack too. EDF and LRS let everyone wait for it.
    """
    long = make_request(0, 20_000, 1, deadline_s=4.0)
    short = [
        make_request(1 + i, 100, 1, arrival_s=1.0 + 0.4 * i, deadline_s=3.5) for i in range(20)
    ]
    return [long, *short]


@pytest.mark.parametrize("policy", ["edf", "lrs"])
def test_edf_convoys_and_lrs_does_not_see_length(policy):
    late = _late(policy, _one_long_one_that_is_lost())

    assert min(late[i] for i in range(1, 21)) > 9.0


def test_lars_weighs_slack_by_length():
    """Sixteen seconds late is less than the length of the long one, and 160 short ones.

    What the long one has done counts up to its length once more: a short one waits no longer than
    twice its own 0.1 s, and for the step under way.
    """
    late = _late("lars", _one_long_one_that_is_lost())

    assert max(late[i] for i in range(1, 21)) < 0.3
    assert late[0] == pytest.approx(16.0 + 20 * 0.1, abs=0.2)


@pytest.mark.parametrize("policy", ["fcfs", "edf", "lrs", "lars"])
def test_each_policy_starts_with_a_prompt_of_its_own(policy):
    requests = [
        make_request(0, 4_000, 1, arrival_s=0.0, deadline_s=90.0),
        make_request(1, 1_000, 1, arrival_s=0.1, deadline_s=12.0),
        make_request(2, 24_000, 1, arrival_s=0.2, deadline_s=30.0),
        make_request(3, 100_000, 1, arrival_s=0.3, deadline_s=110.0),
    ]
    scheduler = make_scheduler(MS_PER_TOKEN, policy=policy, chunk=1000)
    for request in requests:
        scheduler.add(request)

    plan = scheduler.plan(0.3)

    first = {"fcfs": 0, "edf": 1, "lrs": 2, "lars": 3}[policy]
    assert [chunk.request_id for chunk in plan.chunks] == [first]
