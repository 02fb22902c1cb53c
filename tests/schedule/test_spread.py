"""Idle groups help to compute a prompt, and stand in nobody's way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.schedule.plan import Chunk, Plan
from mnemosyne.schedule.spread import cut
from tests.schedule.clocked import (
    PAGE_SIZE,
    Rates,
    make_request,
    make_scheduler,
    serve,
    tokens_of,
)

MACHINE = Rates(1e-3, pair_s=2e-7, step_s=1e-3)
LONG = 4096


def slices_of(plan: Plan, request_id: int = 0) -> list[Chunk]:
    return [c for c in plan.chunks if c.request_id == request_id and c.group is not None]


def first_token_s(num_groups: int, **config) -> float:
    scheduler = make_scheduler(MACHINE, num_pages=[4000] * num_groups, **config)
    return serve(scheduler, [make_request(0, LONG)]).first_token_s[0]


@given(
    rates=st.lists(st.floats(1.0, 50.0), min_size=1, max_size=5),
    total=st.integers(1, 3000),
    budget_s=st.floats(0.1, 100.0),
)
def test_slices_fill_the_budget_or_end_together(rates, total, budget_s):
    def fits(group: int, before: int, seconds: float) -> int:
        return min(int(seconds * rates[group]), total - before)

    sizes = cut(fits, len(rates), total, budget_s)

    full = [int(budget_s * rate) for rate in rates]
    if sum(full) < total:
        assert sizes == full
        return
    assert sum(sizes) == total
    times_s = [size / rate for size, rate in zip(sizes, rates, strict=True) if size]
    assert max(times_s) <= budget_s
    enough_s = total / sum(rates)
    assert max(times_s) <= enough_s + len(rates) + budget_s / 2**13


@pytest.mark.parametrize("config", [{"target_tbt": 0.6}, {"chunk": LONG}], ids=str)
def test_a_lone_prompt_is_computed_as_many_times_faster_as_there_are_groups(config):
    alone_s = first_token_s(1, **config)

    for num_groups in (2, 4):
        spread_s = first_token_s(num_groups, **config)
        assert alone_s / num_groups <= spread_s <= 1.1 * alone_s / num_groups
    assert first_token_s(4, spread="off", **config) == pytest.approx(alone_s)


def test_a_machine_whose_smallest_chunk_takes_longer_than_the_target_spreads_prompts_too():
    slow = Rates(0.1, pair_s=1e-5)
    times_s = []
    for num_groups in (1, 3):
        scheduler = make_scheduler(slow, num_pages=[4000] * num_groups)
        decoding = make_request(1, 3, max_tokens=60)
        run = serve(scheduler, [make_request(0, 1024, arrival_s=0.4), decoding])
        times_s.append(run.first_token_s[0])

    # one group decodes, and so has no room for the smallest slice beside those of the others
    assert times_s[1] <= 1.1 * times_s[0] / 2


def test_slices_grow_shorter_as_they_see_more_keys_and_the_home_comes_last():
    scheduler = make_scheduler(MACHINE, num_pages=[4000] * 3, chunk=LONG)
    scheduler.add(make_request(0, LONG))

    plan = scheduler.plan(0.0)

    ((_, table),) = plan.tables
    sizes = [chunk.num_tokens for chunk in slices_of(plan)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.1 * sizes[-1]
    assert slices_of(plan)[-1].group == table.reporter
    assert [chunk.samples for chunk in slices_of(plan)] == [False, False, True]


def test_pages_that_were_lent_are_free_one_step_after_the_prompt():
    scheduler = make_scheduler(MACHINE, num_pages=[2000] * 2, chunk=LONG // 2)
    scheduler.add(make_request(0, LONG))
    home, ledger = -(-(LONG + 4) // PAGE_SIZE), scheduler.ledger

    used, told = [], []
    for _ in range(3):
        plan = scheduler.plan(0.0)
        scheduler.complete(plan, tokens_of(plan))
        used.append(ledger.num_used)
        told.append([len(table.lent) for _, table in plan.tables])

    assert used == [home + LONG // PAGE_SIZE] * 2 + [home]
    assert told == [[1], [], [0]]


def test_whoever_lacks_pages_gets_those_that_were_lent_in_the_same_step():
    scheduler = make_scheduler(MACHINE, num_pages=[LONG // PAGE_SIZE + 100] * 2)
    scheduler.add(make_request(0, LONG))
    first = scheduler.plan(0.0)
    scheduler.complete(first, {})
    scheduler.add(make_request(1, LONG // 2))

    second = scheduler.plan(0.1)

    assert len(slices_of(first)) == 2
    assert [admission.request_id for admission in second.admitted] == [1]
    tables = dict(second.tables)
    assert tables[0].lent == ()
    assert tables[1].reporter != tables[0].reporter
    assert slices_of(second) == []


def test_a_group_rests_while_it_has_a_prompt_of_its_own_and_helps_again_after_it():
    scheduler = make_scheduler(MACHINE, num_pages=[4000] * 2)
    short = make_request(1, 150, arrival_s=0.2)

    run = serve(scheduler, [make_request(0, LONG), short])

    with_short = [any(c.request_id == 1 and not c.is_decode for c in p.chunks) for p in run.plans]
    num_slices = [len(slices_of(plan)) for plan in run.plans]
    assert any(with_short)
    assert all(n <= 1 for n, beside in zip(num_slices, with_short, strict=True) if beside)
    last = max(index for index, beside in enumerate(with_short) if beside)
    assert 2 in num_slices[:last]
    assert 2 in num_slices[last:]


def test_a_group_that_decodes_takes_no_more_than_its_decodes_leave():
    scheduler = make_scheduler(MACHINE, num_pages=[4000] * 2, target_tbt=0.2)
    decoding = [make_request(i, 1, max_tokens=200) for i in range(1, 31)]
    long = make_request(0, LONG, arrival_s=1.0)

    run = serve(scheduler, [*decoding, long])

    beside = [plan for plan in run.plans if slices_of(plan)]
    assert any(len(slices_of(plan)) == 2 for plan in beside)
    assert all(plan.predicted_s <= 0.2 for plan in beside)


@pytest.mark.parametrize("num_tokens", [100, 511])
def test_a_short_prompt_stays_at_home(num_tokens):
    scheduler = make_scheduler(MACHINE, num_pages=[4000] * 2)
    scheduler.add(make_request(0, num_tokens))

    plan = scheduler.plan(0.0)

    assert slices_of(plan) == []
    assert dict(plan.tables)[0].lent == ()


def test_a_prompt_that_is_cancelled_gives_back_what_was_lent_to_it():
    scheduler = make_scheduler(MACHINE, num_pages=[4000] * 2, depth=2)
    scheduler.add(make_request(0, LONG))
    plans = [scheduler.plan(0.0), scheduler.plan(0.0)]

    scheduler.release(0)
    for plan in plans:
        scheduler.complete(plan, {})

    assert all(len(slices_of(plan)) == 2 for plan in plans)
    assert scheduler.ledger.num_used == 0


def test_a_request_that_grows_gets_pages_that_were_lent_before_anybody_is_set_back():
    num_pages = LONG // PAGE_SIZE + 28
    scheduler = make_scheduler(MACHINE, num_pages=[num_pages] * 2, expected_tokens=8)
    growing = make_request(1, 100, max_tokens=300, is_open=True)
    scheduler.add(growing)
    scheduler.complete(first := scheduler.plan(0.0), tokens_of(first))
    scheduler.add(make_request(0, LONG))

    plans = []
    while not any(not table.lent for plan in plans for i, table in plan.tables if i == 0):
        plans.append(scheduler.plan(0.0))
        scheduler.complete(plans[-1], tokens_of(plans[-1]))

    assert not any(plan.set_back for plan in plans)
    assert any(i == 1 for plan in plans for i, _ in plan.tables)
    assert plans[-1].chunks[-1].stop < LONG, "the prompt goes on at home"
