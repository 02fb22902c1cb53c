"""Claims about what the scheduler puts into a step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.plan import Chunk, Plan
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import StepWork, WorkModel


class FixedRates:
    """A machine whose step takes 1 ms a token and 5 ms a step."""

    def predict(self, work: StepWork) -> float:
        return 0.005 + 0.001 * work.num_tokens

    def observe(self, work: StepWork, seconds: float) -> None:
        pass


def _scheduler(num_pages: int = 1000, depth: int = 1, **config) -> Scheduler:
    return build_scheduler(
        ScheduleConfig(**{"policy": "fcfs", **config}),
        SloConfig(),
        num_groups=1,
        num_pages=num_pages,
        page_size=4,
        max_tokens_per_group=4 * num_pages,
        predictor=FixedRates(),
        work_model=WorkModel([None]),
        depth=depth,
    )


def _tokens(plan):
    return {chunk.request_id: 7 for chunk in plan.chunks if chunk.samples}


def _request(request_id: int, num_prompt_tokens: int, max_tokens: int = 4) -> Request:
    return Request(
        request_id=request_id,
        prompt_ids=np.zeros(num_prompt_tokens, dtype=np.int64),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        end_token_ids=(),
        arrival_s=0.0,
    )


def _run(scheduler: Scheduler):
    plan = scheduler.plan(0.0)
    scheduler.complete(plan, _tokens(plan))
    return plan


def _shape(plan):
    return [(c.request_id, c.start, c.num_tokens, c.samples) for c in plan.chunks]


def test_a_fixed_chunk_cuts_the_prompt_and_samples_only_at_its_end():
    scheduler = _scheduler(chunk=7)
    scheduler.add(_request(0, 16))

    plans = [_run(scheduler) for _ in range(4)]

    assert [_shape(plan) for plan in plans] == [
        [(0, 0, 7, False)],
        [(0, 7, 7, False)],
        [(0, 14, 2, True)],
        [(0, 16, 1, True)],
    ]


def test_a_fixed_chunk_is_shared_by_prompts_in_order_of_arrival():
    scheduler = _scheduler(chunk=10)
    for request_id in range(3):
        scheduler.add(_request(request_id, 6))

    assert _shape(_run(scheduler)) == [(0, 0, 6, True), (1, 0, 4, False)]
    assert _shape(_run(scheduler)) == [(0, 6, 1, True), (1, 4, 2, True), (2, 0, 6, True)]


def test_decodes_come_first_and_the_chunk_fills_the_time_that_is_left():
    scheduler = _scheduler(target_tbt=0.205)
    for request_id in range(3):
        scheduler.add(_request(request_id, 8))
    _run(scheduler)
    scheduler.add(_request(3, 3000))

    plan = _run(scheduler)

    assert [chunk.is_decode for chunk in plan.chunks] == [True, True, True, False]
    assert plan.chunks[-1].num_tokens == 192  # 3 + 192 tokens take 0.200 s
    assert plan.predicted_s <= 0.205


def test_a_prompt_advances_even_when_decodes_alone_exceed_the_target():
    scheduler = _scheduler(target_tbt=0.001)
    scheduler.add(_request(0, 8))
    _run(scheduler)
    scheduler.add(_request(1, 3000))

    assert _shape(_run(scheduler)) == [(0, 8, 1, True), (1, 0, 32, False)]


def test_a_lone_prefill_is_not_cut_to_the_target():
    scheduler = _scheduler(target_tbt=0.02)
    scheduler.add(_request(0, 3000))

    assert _shape(_run(scheduler)) == [(0, 0, 256, False)]


def test_a_decode_in_another_step_in_flight_is_not_delayed_by_a_lone_prefill():
    scheduler = _scheduler(target_tbt=0.2, depth=2)
    scheduler.add(_request(0, 8))
    _run(scheduler)
    scheduler.add(_request(1, 3000))

    with_decode, after_it = scheduler.plan(0.0), scheduler.plan(0.0)

    assert [chunk.is_decode for chunk in with_decode.chunks] == [True, False]
    assert [chunk.is_decode for chunk in after_it.chunks] == [False]
    assert max(with_decode.predicted_s, after_it.predicted_s) <= 0.2


def test_what_never_fits_is_refused_with_the_numbers():
    scheduler = _scheduler(num_pages=10)

    with pytest.raises(ValueError, match=r"40 tokens, got 38 \+ 4 = 42; .*cache\.max_tokens"):
        scheduler.add(_request(0, 38))

    assert scheduler.plan(0.0) is None


def test_what_does_not_fit_now_waits_in_order():
    scheduler = _scheduler(num_pages=10, chunk=100)
    scheduler.add(_request(0, 28))
    scheduler.add(_request(1, 20))
    scheduler.add(_request(2, 1))  # would fit beside 0, but came after 1

    first = _run(scheduler)
    scheduler.release(0)
    second = _run(scheduler)

    assert [a.request_id for a in first.admitted] == [0]
    assert second.released == (0,)
    assert [a.request_id for a in second.admitted] == [1, 2]


def test_a_cancelled_request_gives_its_pages_back_at_once():
    scheduler = _scheduler(chunk=4)
    scheduler.add(_request(0, 28))
    _run(scheduler)

    scheduler.release(0)

    assert scheduler.ledger.num_used == 0
    assert scheduler.plan(0.0) is None


def test_pages_of_a_step_in_flight_are_kept_until_it_is_back():
    scheduler = _scheduler(chunk=4)
    scheduler.add(_request(0, 28))
    plan = scheduler.plan(0.0)

    scheduler.release(0)

    assert scheduler.ledger.num_used == 8
    scheduler.complete(plan, _tokens(plan))
    assert scheduler.ledger.num_used == 0


def test_a_prompt_is_planned_again_before_its_last_chunk_is_back():
    scheduler = _scheduler(chunk=4)
    scheduler.add(_request(0, 7))

    first, second = scheduler.plan(0.0), scheduler.plan(0.0)

    assert _shape(first) + _shape(second) == [(0, 0, 4, False), (0, 4, 3, True)]
    assert scheduler.plan(0.0) is None  # its decode waits for the token


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 6)), min_size=1, max_size=12),
    chunk=st.sampled_from([1, 7, 64, "adaptive"]),
    cancelled=st.sets(st.integers(0, 11), max_size=3),
)
def test_every_token_is_computed_once_and_every_page_comes_back(lengths, chunk, cancelled):
    scheduler = _scheduler(num_pages=30, chunk=chunk, max_sequences=4, target_tbt=0.04)
    computed = dict.fromkeys(range(len(lengths)), 0)
    sampled = dict.fromkeys(computed, 0)
    for request_id, (num_prompt_tokens, max_tokens) in enumerate(lengths):
        scheduler.add(_request(request_id, num_prompt_tokens, max_tokens))

    for step in range(2000):
        plan = scheduler.plan(0.0)
        if plan is None:
            break
        scheduler.complete(plan, _tokens(plan))
        for c in plan.chunks:
            assert c.start == computed[c.request_id]
            computed[c.request_id] = c.stop
            sampled[c.request_id] += c.samples
            is_done = sampled[c.request_id] == lengths[c.request_id][1]
            if is_done or (c.request_id in cancelled and step > 3):
                scheduler.release(c.request_id)

    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.ledger.num_used == 0
    for request_id, (num_prompt_tokens, max_tokens) in enumerate(lengths):
        if request_id not in cancelled:
            assert sampled[request_id] == max_tokens
            assert computed[request_id] == num_prompt_tokens + max_tokens - 1


def test_a_plan_counts_its_decodes() -> None:
    decodes = tuple(Chunk(i, 10 + i, 1, True, 5) for i in range(3))
    prefills = (Chunk(7, 0, 4, False), Chunk(8, 0, 2, True))

    for first, last in (((), prefills), (decodes, ()), (decodes, prefills), ((), ())):
        assert Plan(0, first + last).num_decodes == len(first)


def test_of_a_filled_prompt_the_last_token_alone_is_planned():
    scheduler = _scheduler(chunk=64)
    scheduler.add(_request(0, 500), is_filled=True)
    scheduler.add(_request(1, 1), is_filled=True)
    scheduler.add(_request(2, 100))

    assert _shape(_run(scheduler)) == [(0, 499, 1, True), (1, 0, 1, True), (2, 0, 62, False)]
    assert _shape(_run(scheduler)) == [(0, 500, 1, True), (1, 1, 1, True), (2, 62, 38, True)]
