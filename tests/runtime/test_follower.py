"""A rank that follows runs every plan in order, reports where it has to, and stops when told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from mnemosyne.request import Sampled
from mnemosyne.runtime.follower import follow
from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Plan, StepResult

PLANS = [Plan(index, (), predicted_s=0.5 * index) for index in range(4)]


class Inbox:
    """Messages in order, some of which have come already; what is sent is kept."""

    def __init__(self, messages: list[Any], num_come: int = 0) -> None:
        self.messages = deque(messages)
        self._num_late = len(messages) - num_come
        self.sent: list[StepResult] = []

    def recv(self) -> Any:
        return self.messages.popleft()

    def has_message(self) -> bool:
        return len(self.messages) > self._num_late

    def send_result(self, result: StepResult) -> None:
        self.sent.append(result)


class EvenReporter:
    """A worker that has something to report of every other step."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.expected: list[tuple[int, int]] = []  # index, and the steps run before

    def expect(self, plan: Plan) -> None:
        self.expected.append((plan.index, len(self.ran)))

    def run(self, plan: Plan) -> StepResult | None:
        self.ran.append(plan.index)
        return StepResult(plan.index, {7: Sampled(plan.index)}) if plan.index % 2 == 0 else None


def test_plans_are_run_in_order_and_reported_until_another_message_comes() -> None:
    inbox, worker = Inbox([*PLANS, "the end", Plan(9, ())]), EvenReporter()
    watched = []

    @contextmanager
    def watch(index: int, predicted_s: float) -> Iterator[None]:
        yield
        watched.append((index, predicted_s, len(worker.ran)))

    ending = follow(inbox, cast(Worker, worker), watch)

    assert ending == "the end"
    assert worker.ran == [0, 1, 2, 3]
    assert inbox.sent == [StepResult(0, {7: Sampled(0)}), StepResult(2, {7: Sampled(2)})]
    assert watched == [(0, 0.0, 1), (1, 0.5, 2), (2, 1.0, 3), (3, 1.5, 4)]


def test_plans_that_have_come_are_announced_before_the_step_at_hand_is_computed() -> None:
    inbox, worker = Inbox(list[Any]([*PLANS, "the end", Plan(9, ())]), num_come=3), EvenReporter()

    assert follow(inbox, cast(Worker, worker), lambda *_: nullcontext()) == "the end"

    assert worker.ran == [0, 1, 2, 3]
    announced = dict(reversed(worker.expected))  # when each was announced first
    assert announced == {0: 0, 1: 0, 2: 0, 3: 3}


def test_what_follows_the_end_of_a_call_is_left_for_the_next_one() -> None:
    inbox, worker = Inbox([PLANS[0], "the end", PLANS[1], "another"], num_come=4), EvenReporter()

    assert follow(inbox, cast(Worker, worker), lambda *_: nullcontext()) == "the end"
    assert list(inbox.messages) == [PLANS[1], "another"]
    assert follow(inbox, cast(Worker, worker), lambda *_: nullcontext()) == "another"
