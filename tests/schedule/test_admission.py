"""Claims about who is let in when pages or places are scarce."""

from __future__ import annotations

import pytest

from mnemosyne.config import SloConfig
from tests.schedule.clocked import Rates, make_request, make_scheduler, serve, tokens_of

PAGES = 100  # of 4 tokens


def _admitted(plan) -> list[int]:
    return [admission.request_id for admission in plan.admitted]


def _with_a_long_one_waiting(policy: str = "lars", **fields):
    """A request of 60 pages runs, one of 80 waits behind it: ids 0 and 1."""
    scheduler = make_scheduler(num_pages=[PAGES], policy=policy, chunk=64)
    scheduler.add(make_request(0, 236))
    plan = scheduler.plan(0.0)
    scheduler.complete(plan, tokens_of(plan))
    scheduler.add(make_request(1, 316, **fields))
    return scheduler


@pytest.mark.parametrize("policy", ["edf", "lrs", "lars"])
def test_short_requests_pass_a_long_one_that_does_not_fit(policy):
    scheduler = _with_a_long_one_waiting(policy)
    scheduler.add(make_request(2, 10))

    assert _admitted(scheduler.plan(0.0)) == [2]


def test_nobody_passes_anybody_under_fcfs():
    scheduler = _with_a_long_one_waiting("fcfs")
    scheduler.add(make_request(2, 10))

    assert _admitted(scheduler.plan(0.0)) == []


def test_who_is_overdue_is_passed_only_as_far_as_it_would_fit_beside():
    scheduler = _with_a_long_one_waiting(deadline_s=1.0)
    for request_id in range(2, 12):
        scheduler.add(make_request(request_id, 28, arrival_s=9.0))  # 8 pages each

    assert _admitted(scheduler.plan(9.0)) == [2, 3]  # 80 and two of 8 pages; a third makes 104

    scheduler.release(2)  # no step that is under way holds it
    assert _admitted(scheduler.plan(9.0)) == [4]


def test_the_long_one_starts_as_soon_as_those_before_it_are_gone():
    scheduler = _with_a_long_one_waiting(deadline_s=1.0)
    scheduler.add(make_request(2, 28, arrival_s=9.0))
    first = scheduler.plan(9.0)
    scheduler.complete(first, tokens_of(first))
    scheduler.add(make_request(3, 28, arrival_s=9.0))

    scheduler.release(0)

    assert _admitted(scheduler.plan(9.0)) == [1, 3]


def test_a_higher_class_takes_pages_that_are_reserved():
    scheduler = _with_a_long_one_waiting(deadline_s=1.0, priority=1)
    scheduler.add(make_request(2, 124, arrival_s=9.0, priority=1))
    scheduler.add(make_request(3, 124, arrival_s=9.0, priority=0))  # 32 pages

    assert _admitted(scheduler.plan(9.0)) == [3]


def test_a_reservation_ends_with_its_request():
    scheduler = _with_a_long_one_waiting(deadline_s=1.0)
    scheduler.plan(9.0)
    scheduler.add(make_request(2, 124, arrival_s=9.0))
    assert _admitted(scheduler.plan(9.0)) == []

    scheduler.release(1)

    assert _admitted(scheduler.plan(9.0)) == [2]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [0, 1, 2]), ("edf", [2, 0, 1])])
def test_places_go_by_the_policy_as_well(policy, order):
    scheduler = make_scheduler(policy=policy, max_sequences=1)
    requests = [
        make_request(0, 50, deadline_s=20.0),
        make_request(1, 50, deadline_s=30.0),
        make_request(2, 50, deadline_s=10.0),
    ]

    assert serve(scheduler, requests).admitted == order


@pytest.mark.parametrize("policy", ["fcfs", "edf", "lrs", "lars"])
@pytest.mark.parametrize("num_pages", [[PAGES], [PAGES, PAGES]])
def test_a_stream_of_short_requests_never_keeps_a_long_one_out(policy, num_pages):
    """Half of the cache is always taken by short ones, the long one needs nearly all of it."""
    scheduler = make_scheduler(
        Rates(1e-3, step_s=0.01),
        num_pages=num_pages,
        max_tokens_per_group=4 * PAGES,
        policy=policy,
        slo=SloConfig(ttft_min=0.5),
    )
    num_short = 600 * len(num_pages)
    short = [
        make_request(2 + i, 40, 20, arrival_s=0.05 * i / len(num_pages)) for i in range(num_short)
    ]
    long = make_request(1, 380 * len(num_pages) - 40, 40, arrival_s=1.0)

    run = serve(scheduler, [long, *short])

    assert run.first_token_s[1] < short[-1].arrival_s / 2


def test_the_deadline_is_known_when_a_request_is_accepted():
    scheduler = make_scheduler(Rates(1e-3), slo=SloConfig(ttft_scale=3.0, ttft_min=0.5))

    assert scheduler.add(make_request(0, 1000)) == pytest.approx(3.0)
    assert scheduler.add(make_request(1, 10)) == 0.5
    assert scheduler.add(make_request(2, 10, deadline_s=9.0)) == 9.0


def test_filled_prompts_are_no_work_ahead_of_a_group():
    scheduler = make_scheduler(num_pages=[1000, 1000], policy="fcfs", chunk=64)
    scheduler.add(make_request(0, 2000), is_filled=True)
    scheduler.add(make_request(1, 100))
    scheduler.add(make_request(2, 50))

    tables = scheduler.plan(0.0).tables

    assert [table.reporter for _, table in tables] == [0, 1, 0]
