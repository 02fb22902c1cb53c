"""Claims about the order of prefills."""

from dataclasses import fields

import numpy as np
import pytest

from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.policy import POLICIES, Urgency, relative_slack
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import StepWork, WorkModel
from tests.schedule.clocked import Rates, make_request, make_scheduler, serve


class MillisecondPerToken:
    """A machine whose step takes 1 ms a token."""

    def predict(self, work: StepWork) -> float:
        return 0.001 * work.num_tokens

    def observe(self, work: StepWork, seconds: float) -> None:
        pass


NAMES = ["first", "due", "tight", "long"]
CANDIDATES = Urgency(
    arrival_s=np.array([0.0, 1.0, 2.0, 3.0]),
    due_s=np.array([90.0, 13.0, 32.0, 113.0]),
    total_s=np.array([4.0, 1.0, 24.0, 100.0]),
    done_s=np.zeros(4),
)
NOW_S = 3.0


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fcfs", ["first", "due", "tight", "long"]),
        ("edf", ["due", "tight", "first", "long"]),
        ("lrs", ["tight", "due", "long", "first"]),
        ("lars", ["long", "tight", "due", "first"]),
    ],
)
def test_each_policy_has_an_order_of_its_own(policy, order):
    keys = POLICIES[policy].key(CANDIDATES, NOW_S, 1.0)

    assert [NAMES[row] for row in np.argsort(keys)] == order


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_request_is_weighed_as_many_are(policy):
    rng = np.random.default_rng(0)
    many = Urgency(*rng.uniform(0, 100, (4, 50)))
    together = POLICIES[policy].key(many, NOW_S, 1.3)

    for row in range(50):
        one = Urgency(*(float(getattr(many, field.name)[row]) for field in fields(Urgency)))
        assert POLICIES[policy].key(one, NOW_S, 1.3) == together[row]


@pytest.mark.parametrize(("total_s", "factor"), [(0.0, 1.0), (5.0, 0.0)])
def test_prompts_of_no_predicted_time_go_by_their_slack(total_s, factor):
    early, late = (Urgency(0.0, due_s, total_s, 0.0) for due_s in (5.0, 6.0))

    assert relative_slack(early, NOW_S, factor) < relative_slack(late, NOW_S, factor)


@pytest.mark.parametrize("kind", [float, lambda value: np.array([value])])
def test_of_two_late_requests_of_one_length_the_one_nearer_its_end_goes_first(kind):
    behind, ahead = (
        Urgency(kind(0.0), kind(due_s), kind(10.0), kind(done_s))
        for due_s, done_s in [(5.0, 2.0), (2.0, 5.0)]  # both are late by 6 s
    )

    assert relative_slack(ahead, NOW_S, 1.0) < relative_slack(behind, NOW_S, 1.0) < 0


def test_slack_to_spare_is_a_share_of_the_whole_work_however_much_is_done():
    fresh, begun = Urgency(0.0, 23.0, 10.0, 0.0), Urgency(0.0, 18.0, 10.0, 5.0)

    assert relative_slack(fresh, NOW_S, 1.0) == relative_slack(begun, NOW_S, 1.0) == 1.0


def _scheduler(**config) -> Scheduler:
    return build_scheduler(
        ScheduleConfig(**config),
        SloConfig(ttft_scale=2.0, ttft_min=1.0),
        num_groups=1,
        num_pages=2000,
        page_size=64,
        max_tokens_per_group=2000 * 64,
        predictor=MillisecondPerToken(),
        work_model=WorkModel([None]),
    )


def _tokens(plan):
    return {chunk.request_id: 7 for chunk in plan.chunks if chunk.samples}


def _request(request_id: int, num_prompt_tokens: int, **fields) -> Request:
    return Request(
        request_id=request_id,
        prompt_ids=np.zeros(num_prompt_tokens, dtype=np.int64),
        params=SamplingParams(max_tokens=4),
        seed=0,
        end_token_ids=(),
        **{"arrival_s": 0.0, **fields},
    )


def _sizes(plan):
    return {chunk.request_id: chunk.num_tokens for chunk in plan.chunks}


def test_short_prompts_ride_along_with_a_long_one_that_has_slack():
    scheduler = _scheduler(target_tbt=1.0, long_tokens=5000)
    scheduler.add(_request(0, 50_000))
    scheduler.add(_request(1, 100))
    scheduler.add(_request(2, 100))

    plan = scheduler.plan(0.0)

    assert _sizes(plan) == {0: 576, 1: 100, 2: 100}  # 600 of 1000 tokens, in multiples of 32


def test_a_long_prompt_that_is_late_gives_nothing_up():
    scheduler = _scheduler(target_tbt=1.0, long_tokens=5000)
    scheduler.add(_request(0, 50_000))
    scheduler.add(_request(1, 100, arrival_s=60.0))

    plan = scheduler.plan(now_s=60.0)

    assert _sizes(plan) == {0: 992}


def test_two_long_prompts_never_share_a_step():
    scheduler = _scheduler(target_tbt=1.0, long_tokens=500)
    for request_id in range(3):
        scheduler.add(_request(request_id, 50_000, arrival_s=float(request_id)))

    assert set(_sizes(scheduler.plan(3.0))) == {0}


def test_a_preempted_prompt_goes_on_where_it_stopped():
    scheduler = _scheduler(chunk=256, policy="edf")
    scheduler.add(_request(0, 1000, deadline_s=100.0))
    first = scheduler.plan(0.0)
    scheduler.complete(first, _tokens(first))
    pages = scheduler.ledger.num_used
    scheduler.add(_request(1, 256, deadline_s=1.0, arrival_s=1.0))

    preempting = scheduler.plan(1.0)
    scheduler.complete(preempting, _tokens(preempting))
    resumed = scheduler.plan(2.0)

    assert _sizes(preempting) == {1: 256}
    assert [(c.request_id, c.start) for c in resumed.chunks if not c.is_decode] == [(0, 256)]
    assert scheduler.ledger.num_used > pages


def test_a_lower_priority_number_goes_first_under_every_policy():
    for policy in POLICIES:
        scheduler = _scheduler(chunk=256, policy=policy)
        scheduler.add(_request(0, 300, deadline_s=1.0, priority=1))
        scheduler.add(_request(1, 300, deadline_s=1000.0, arrival_s=5.0))

        assert list(_sizes(scheduler.plan(5.0))) == [1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("deadline_s", [1e300, np.finfo(np.float64).max, 5e-324])
def test_many_with_a_deadline_beyond_all_measure_are_served_as_they_came(policy, deadline_s):
    scheduler = make_scheduler(Rates(1e-6), policy=policy, max_sequences=64)
    requests = [make_request(turn, 200, 3, deadline_s=deadline_s) for turn in range(40)]

    run = serve(scheduler, requests, max_steps=200)

    assert [chunk.request_id for chunk in run.plans[0].chunks] == list(range(40))
    assert sorted(run.finished_s) == list(range(40))
