"""Requests whose end is not known: they all end, and nobody is set back for ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.scheduler import Scheduler
from tests.schedule.clocked import PAGE_SIZE, make_request, make_scheduler, tokens_of

EXPECTED = 8  # tokens of an output


def add_open(scheduler: Scheduler, request_id: int, num_prompt_tokens: int, **fields) -> None:
    """Queue a request that may take whatever fits."""
    max_tokens = scheduler.ledger.max_request_tokens() - num_prompt_tokens
    request = make_request(request_id, num_prompt_tokens, max_tokens, **fields)
    scheduler.add(replace(request, is_open=True))


def scheduler_of(num_pages: int, **fields) -> Scheduler:
    config = {"chunk": 16, "expected_tokens": EXPECTED, **fields}
    return make_scheduler(num_pages=[num_pages], **config)


def run(scheduler: Scheduler, left: dict[int, int]) -> list[Plan]:
    """Step until each request has sampled so many tokens.

    Raises:
        AssertionError: if nobody can move, or it does not come to an end.
    """
    plans, done = list[Plan](), dict.fromkeys(left, 0)
    while done:
        plan = scheduler.plan(float(len(plans)))
        assert plan is not None, "nobody can move"
        plans.append(plan)
        scheduler.complete(plan, tokens_of(plan))
        for chunk in plan.chunks:
            done[chunk.request_id] += chunk.samples
            if done[chunk.request_id] == left[chunk.request_id]:
                scheduler.release(chunk.request_id)
                del done[chunk.request_id]
        assert len(plans) < 20_000, "it does not come to an end"
    return plans


def test_pages_come_one_by_one_as_the_output_grows():
    scheduler = scheduler_of(num_pages=100)
    add_open(scheduler, 0, 10)

    plans = run(scheduler, {0: 30})

    sizes = [len(table.pages_on(0)) for plan in plans for _, table in plan.tables]
    assert sizes == [5, 6, 7, 8, 9, 10]  # 18 tokens at first, 39 in the end
    assert scheduler.ledger.num_used == 0


def test_a_request_that_says_its_end_has_its_pages_from_the_start():
    scheduler = scheduler_of(num_pages=200)
    scheduler.add(make_request(0, 10, max_tokens=400))

    plans = run(scheduler, {0: 30})

    assert [len(table.pages_on(0)) for plan in plans for _, table in plan.tables] == [103]


def test_the_one_that_is_due_last_is_set_back():
    scheduler = scheduler_of(num_pages=12)
    for request_id, deadline_s in enumerate((5.0, 9.0, 1.0)):
        add_open(scheduler, request_id, 8, deadline_s=deadline_s)

    plans = run(scheduler, dict.fromkeys(range(3), 20))

    assert next(i for plan in plans for i in plan.set_back) == 1


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("policy", ["fcfs", "lars"])
def test_all_end_however_few_pages_there_are_and_none_is_set_back_for_ever(policy, depth):
    rng = np.random.default_rng(depth)
    for num_pages in (30, 45, 90):
        scheduler = scheduler_of(num_pages, policy=policy, depth=depth)
        left = {}
        for request_id in range(16):
            left[request_id] = int(rng.integers(1, 60))
            add_open(scheduler, request_id, int(rng.integers(1, 50)))

        plans = run(scheduler, left)

        set_back = [request_id for plan in plans for request_id in plan.set_back]
        # the output that a request asks for doubles each time
        assert max(map(set_back.count, left)) <= 1 + np.log2(60 / EXPECTED)
        assert scheduler.ledger.num_used == 0
        assert num_pages > 60 or set_back


def test_a_request_that_is_set_back_goes_on_where_it_was():
    scheduler = scheduler_of(num_pages=12)
    for request_id in range(3):
        add_open(scheduler, request_id, 8)

    plans = run(scheduler, dict.fromkeys(range(3), 20))

    victim = next(i for plan in plans for i in plan.set_back)
    admissions = [a for plan in plans for a in plan.admitted if a.request_id == victim]
    sampled = [c for plan in plans for c in plan.chunks if c.request_id == victim and c.samples]
    assert len(admissions) > 1
    assert admissions[1].num_given == len(admissions[1].prompt_ids) - 8
    assert admissions[1].prompt_ids[8:].tolist() == [7] * admissions[1].num_given
    assert len(sampled) == 20


def test_a_table_grows_onto_another_group_once_a_group_is_full():
    scheduler = make_scheduler(
        num_pages=[20, 20],
        max_tokens_per_group=5 * PAGE_SIZE,
        chunk=16,
        expected_tokens=EXPECTED,
    )
    add_open(scheduler, 0, 10)

    plans = run(scheduler, {0: 25})

    last = [table for plan in plans for _, table in plan.tables][-1]
    assert [(e.group, e.start, len(e.pages)) for e in last.extents] == [(0, 0, 5), (1, 20, 4)]
