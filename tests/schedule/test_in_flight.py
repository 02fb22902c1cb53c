"""Claims about when steps in flight should be done."""

from __future__ import annotations

import pytest

from mnemosyne.schedule.in_flight import StepsInFlight
from mnemosyne.schedule.work import StepWork

WORK = (StepWork(),)


def _steps(depth: int, *seconds: float) -> StepsInFlight:
    """Steps that are planned as soon as the first stage is free."""
    steps, now_s = StepsInFlight(depth), 0.0
    for index, step_s in enumerate(seconds):
        steps.add(index, WORK, now_s, step_s)
        now_s += step_s / depth
    return steps


def test_with_nothing_in_flight_there_is_nothing_to_wait_for():
    steps = _steps(1, 0.5)

    steps.remove(0)

    assert steps.done_s(0.3) == 0.3
    assert steps.take_work(0) is WORK


def test_steps_of_equal_time_follow_each_other_by_the_time_of_a_stage():
    steps = _steps(4, 0.8, 0.8, 0.8)

    assert steps.done_s(0.6) == pytest.approx(0.8 + 2 * 0.2)


def test_a_quick_step_leaves_behind_the_slow_one_before_it():
    steps = _steps(4, 0.8, 0.08)

    assert steps.done_s(0.3) == pytest.approx(0.8 + 0.02)


def test_steps_that_should_have_been_done_are_waited_for_no_longer():
    assert _steps(2, 0.5, 0.5).done_s(9.0) == 9.0


def test_predictions_that_are_ten_times_too_long_do_not_add_up():
    steps, now_s = StepsInFlight(2), 0.0

    for index in range(100):
        steps.add(index, WORK, now_s, 1.0)
        now_s += 0.05
        if index:
            steps.remove(index - 1)

    assert steps.done_s(now_s) <= now_s + 1.0
