"""Claims about what the scheduler makes of cached prefixes."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.prefixes import Prefixes
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import WorkModel
from tests.schedule.clocked import PAGE_SIZE, Rates, tokens_of

LONG = 40  # tokens: ten pages


def make_scheduler(num_groups: int = 1, num_pages: int = 100, **config) -> Scheduler:
    per_group = config.pop("max_tokens_per_group", num_pages * PAGE_SIZE)
    windows = config.pop("windows", [None])
    return build_scheduler(
        ScheduleConfig(**{"chunk": 16, "policy": "lars", **config}),
        SloConfig(ttft_scale=2.0, ttft_min=0.001),
        num_groups=num_groups,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_tokens_per_group=per_group,
        predictor=Rates(1e-3),
        work_model=WorkModel(windows, num_groups),
        fingerprint=b"model",
        kinds=PageKinds.of(windows, PAGE_SIZE),
    )


def make_request(request_id: int, ids: list[int] | range, max_tokens: int = 4, **fields) -> Request:
    own = {name: fields.pop(name) for name in ("priority", "arrival_s") if name in fields}
    return Request(
        request_id=request_id,
        prompt_ids=np.array(ids, dtype=np.int64),
        params=SamplingParams(max_tokens=max_tokens, **fields),
        seed=0,
        end_token_ids=(),
        **{"arrival_s": 0.0, **own},
    )


def starts_of(plan: Plan) -> dict[int, int]:
    """Of each request of a plan, the position that it is computed from."""
    return {chunk.request_id: chunk.start for chunk in plan.chunks}


def run_to_end(scheduler: Scheduler, *requests: Request) -> list[Plan]:
    for request in requests:
        scheduler.add(request)
    plans, left = [], {r.request_id: r.params.max_tokens for r in requests}
    while any(request.request_id in left for request in requests):
        plan = step(scheduler)
        plans.append(plan)
        for chunk in plan.chunks:
            left[chunk.request_id] = left.get(chunk.request_id, 9) - chunk.samples
            if left[chunk.request_id] == 0:
                scheduler.release(chunk.request_id)
                del left[chunk.request_id]
    return plans


def step(scheduler: Scheduler, now_s: float = 0.0, broken: tuple[int, ...] = ()) -> Plan:
    plan = scheduler.plan(now_s)
    assert plan is not None
    scheduler.complete(plan, tokens_of(plan), broken)
    return plan


def test_a_request_starts_after_its_longest_cached_prefix():
    scheduler = make_scheduler()
    run_to_end(scheduler, make_request(0, range(LONG)))
    scheduler.add(make_request(1, [*range(30), 0, 0, 0]))

    plan = step(scheduler)

    assert starts_of(plan) == {1: 28}
    assert plan.hits[0][:2] == (1, 28)
    table, (_, first) = scheduler.ledger.table_of(1), plan.tables[0]
    assert first is table
    assert scheduler.ledger.num_used == len(table.pages_on(0)) == 10


def test_output_is_found_again_as_part_of_a_later_prompt():
    scheduler = make_scheduler()
    plans = run_to_end(scheduler, make_request(0, range(10), max_tokens=12))
    decodes = [c.token_id for plan in plans for c in plan.chunks if c.is_decode]
    scheduler.add(make_request(1, [*range(10), *decodes, 5, 5]))

    # the last token that is sampled is never computed
    assert starts_of(step(scheduler)) == {1: (10 + len(decodes)) // PAGE_SIZE * PAGE_SIZE}


def test_one_token_is_left_to_sample_from():
    scheduler = make_scheduler()
    run_to_end(scheduler, make_request(0, range(LONG)))
    scheduler.add(make_request(1, range(LONG)))

    assert starts_of(step(scheduler)) == {1: LONG - PAGE_SIZE}


def test_pages_of_running_requests_are_shared_as_they_are_filled():
    scheduler = make_scheduler()
    scheduler.add(make_request(0, range(LONG)))
    step(scheduler)
    used = scheduler.ledger.num_used
    scheduler.add(make_request(1, [*range(16), 9, 9]))

    plan = step(scheduler)

    assert starts_of(plan) == {0: 16, 1: 16} or starts_of(plan) == {1: 16, 0: 16}
    assert scheduler.ledger.num_used == used + 2


def test_samples_of_one_prompt_wait_for_the_first_of_them_and_share_its_pages():
    scheduler = make_scheduler(num_pages=20)  # two of them alone would not fit

    plans = run_to_end(scheduler, *(make_request(i, range(LONG)) for i in range(8)))

    computed = sum(c.num_tokens for p in plans for c in p.chunks if not c.is_decode)
    assert computed == LONG + 7 * PAGE_SIZE
    assert scheduler.ledger.num_used == 0


def test_who_waits_for_a_prompt_looks_no_page_up_while_it_goes_on(monkeypatch):
    scheduler = make_scheduler()
    for request_id in range(9):
        scheduler.add(make_request(request_id, range(LONG)))
    step(scheduler)
    monkeypatch.setattr(Prefixes, "count", None)

    assert starts_of(step(scheduler)) == {0: 16}


def test_a_more_urgent_class_waits_for_nobody_less_urgent():
    scheduler = make_scheduler()
    scheduler.add(make_request(0, range(LONG), priority=1))
    step(scheduler)
    scheduler.add(make_request(1, range(LONG), priority=0))
    scheduler.add(make_request(2, range(LONG), priority=1))

    plan = step(scheduler)

    assert starts_of(plan) == {1: 16}


def test_nobody_waits_for_long_beyond_what_the_pages_should_take():
    scheduler = make_scheduler(chunk=8)
    scheduler.add(make_request(0, range(LONG)))
    step(scheduler)
    urgent = [make_request(i, range(i * 100, i * 100 + LONG), priority=-1) for i in range(2, 9)]
    for request in (make_request(1, range(LONG)), *urgent):
        scheduler.add(request)

    assert {a.request_id for a in step(scheduler, 0.0).admitted} == set(range(2, 9))
    assert [a.request_id for a in step(scheduler, 1.0).admitted] == [1]


def test_when_the_first_of_them_is_cancelled_the_next_one_goes_on():
    scheduler = make_scheduler()
    for request_id in range(3):
        scheduler.add(make_request(request_id, range(LONG)))
    step(scheduler)
    scheduler.release(0)

    assert starts_of(step(scheduler)) == {1: 16}
    assert starts_of(step(scheduler)) == {1: 32}
    assert starts_of(step(scheduler)) == {1: LONG, 2: 36}


@pytest.mark.parametrize("fields", [{"cache_salt": "b"}, {"prompt_logprobs": 0}])
def test_other_salts_and_reported_prompts_are_computed_from_the_start(fields):
    scheduler = make_scheduler()
    run_to_end(scheduler, make_request(0, range(LONG)))
    scheduler.add(make_request(1, range(LONG), **fields))

    assert starts_of(step(scheduler)) == {1: 0}


def test_equal_salts_share():
    scheduler = make_scheduler()
    run_to_end(scheduler, make_request(0, range(LONG), cache_salt="a"))
    scheduler.add(make_request(1, range(LONG), cache_salt="a"))

    assert starts_of(step(scheduler)) == {1: LONG - PAGE_SIZE}


def test_pages_from_a_broken_step_on_are_never_shared():
    scheduler = make_scheduler()
    scheduler.add(make_request(0, range(LONG)))
    step(scheduler)
    step(scheduler, broken=(0,))
    step(scheduler)
    scheduler.release(0)
    scheduler.add(make_request(1, range(LONG)))

    assert starts_of(step(scheduler)) == {1: 16}


def test_windows_that_went_on_after_a_step_broke_are_never_kept():
    scheduler = make_scheduler(windows=[8, 8])
    scheduler.add(make_request(0, range(LONG)))
    step(scheduler)
    step(scheduler, broken=(0,))  # its ring holds later tokens than those of its whole pages
    scheduler.release(0)
    scheduler.add(make_request(1, range(LONG)))

    assert starts_of(step(scheduler)) == {1: 0}


def test_filled_pages_hold_anything_and_are_not_shared():
    scheduler = make_scheduler()
    scheduler.add(make_request(0, range(LONG)), is_filled=True)
    step(scheduler)
    scheduler.release(0)
    scheduler.add(make_request(1, range(LONG)))

    assert starts_of(step(scheduler)) == {1: 0}


def test_a_cleared_cache_knows_nothing():
    scheduler = make_scheduler()
    run_to_end(scheduler, make_request(0, range(LONG)))
    scheduler.clear_cache()
    scheduler.add(make_request(1, range(LONG)))

    assert starts_of(step(scheduler)) == {1: 0}


def test_deadlines_and_slack_count_what_is_left_to_compute():
    scheduler = make_scheduler()
    assert scheduler.add(make_request(0, range(LONG))) == pytest.approx(2 * LONG * 1e-3)
    while scheduler.num_waiting or scheduler.num_running:
        plan = step(scheduler)
        if plan.chunks[0].is_decode:
            scheduler.release(0)
    left = 4 + PAGE_SIZE

    deadline_s = scheduler.add(make_request(1, [*range(LONG - PAGE_SIZE), *[7] * left]))
    (slack,) = step(scheduler, 0.0).slack_s

    assert deadline_s == pytest.approx(2 * left * 1e-3)
    assert slack == pytest.approx(left * 1e-3)


def test_room_is_made_by_forgetting_what_was_used_longest_ago():
    scheduler = make_scheduler(num_pages=24)
    for request_id in range(2):
        run_to_end(
            scheduler, make_request(request_id, range(request_id * 100, request_id * 100 + 40))
        )
    run_to_end(scheduler, make_request(2, range(40)))  # the first prompt again

    run_to_end(scheduler, make_request(3, range(300, 340)))

    assert scheduler.ledger.num_used == 0
    scheduler.add(make_request(4, range(40)))
    assert starts_of(step(scheduler)) == {4: 36}


def test_the_place_where_a_long_prompt_differs_is_told():
    scheduler = make_scheduler(num_pages=3000, chunk=5000)
    run_to_end(scheduler, make_request(0, range(4200)))
    other = [*range(4200)]
    other[41] = 7777
    scheduler.add(make_request(1, other))

    (hit,) = step(scheduler).hits

    assert (hit.num_tokens, hit.differs_at, hit.cached_ids) == (40, 41, (41, 42, 43))


def test_nothing_is_told_of_a_prompt_of_another_salt():
    scheduler = make_scheduler(num_pages=3000, chunk=5000)
    run_to_end(scheduler, make_request(0, range(4200), cache_salt="a"))
    scheduler.add(make_request(1, [0, 1, *range(7, 4205)], cache_salt="b"))

    (hit,) = step(scheduler).hits

    assert (hit.num_tokens, hit.differs_at, hit.cached_ids) == (0, None, ())


def test_the_difference_may_lie_where_another_group_goes_on():
    scheduler = make_scheduler(num_groups=2, num_pages=1100, max_tokens_per_group=4096, chunk=5000)
    run_to_end(scheduler, make_request(0, range(4200)))
    other = [*range(4200)]
    other[4097] = 7777
    scheduler.add(make_request(1, other))

    (hit,) = step(scheduler).hits

    assert (hit.num_tokens, hit.differs_at, hit.cached_ids) == (4096, 4097, (4097, 4098, 4099))


def test_groups_share_what_each_of_them_holds():
    scheduler = make_scheduler(num_groups=3, max_tokens_per_group=24)
    run_to_end(scheduler, make_request(0, range(60), max_tokens=2))
    scheduler.add(make_request(1, [*range(44), 5, 5, 5, 5], max_tokens=2))

    plan = step(scheduler)

    ((_, table),) = plan.tables
    assert starts_of(plan) == {1: 44}
    assert [extent.start for extent in table.extents] == [0, 24, 48]


def test_the_group_that_holds_the_prefix_is_chosen():
    scheduler = make_scheduler(num_groups=2)
    scheduler.add(make_request(0, range(500, 504)))
    run_to_end(scheduler, make_request(1, range(LONG)))
    scheduler.add(make_request(2, range(LONG)))

    plan = step(scheduler)

    assert starts_of(plan)[2] == LONG - PAGE_SIZE
    assert dict(plan.tables)[2].reporter == 1


def test_a_group_with_more_to_do_than_the_prefix_saves_is_passed_over():
    scheduler = make_scheduler(num_groups=2)
    run_to_end(scheduler, make_request(0, range(LONG)))
    scheduler.add(make_request(1, range(500, 580)))
    step(scheduler)
    scheduler.add(make_request(2, range(LONG)))

    tables = dict(step(scheduler).tables)

    assert scheduler.ledger.table_of(1).reporter == 0
    assert tables[2].reporter == 1


@pytest.mark.parametrize("policy", ["fcfs", "lars"])
def test_random_conversations_all_finish(policy):
    rng, scheduler = np.random.default_rng(1), make_scheduler(num_pages=40, policy=policy)
    texts, requests = [list(range(20))], []
    for request_id in range(150):
        text = texts[int(rng.integers(len(texts)))]
        prompt = [*text[: int(rng.integers(1, len(text) + 1))], *rng.integers(0, 9, 5).tolist()]
        texts.append(prompt[:100])
        requests.append(make_request(request_id, prompt[:100], arrival_s=float(request_id) * 0.01))

    for request in requests:
        scheduler.add(request)
    left = {r.request_id: 4 for r in requests}
    now_s = 0.0
    for _ in range(5000):
        plan = scheduler.plan(now_s)
        if plan is None:
            break
        now_s += plan.predicted_s
        scheduler.complete(plan, tokens_of(plan))
        for chunk in plan.chunks:
            left[chunk.request_id] -= chunk.samples
            if left[chunk.request_id] == 0:
                scheduler.release(chunk.request_id)

    assert set(left.values()) == {0}
    assert scheduler.ledger.num_used == 0
