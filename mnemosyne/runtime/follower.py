"""The life of every rank but the driver: take plans, compute its part, report."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Plan, StepResult

Watch = Callable[[int, float], AbstractContextManager[None]]  # of a step: index, predicted seconds


class Inbox(Protocol):
    """The follower's end of the control channel."""

    def recv(self) -> Any:
        """The next plan, or the message that ends this call."""

    def has_message(self) -> bool:
        """Return whether ``recv`` would not wait."""

    def send_result(self, result: StepResult) -> None:
        """Report the result of this rank's group for a step."""


def follow(inbox: Inbox, worker: Worker, watch: Watch) -> Any:
    """Run plans until the driver says something else.

    Args:
        inbox: where plans come from and results go.
        worker: this rank's part of the model.
        watch: makes the context in which a step runs.

    Returns:
        The message that was no plan.
    """
    messages = deque([inbox.recv()])
    while isinstance(plan := messages.popleft(), Plan):
        with watch(plan.index, plan.predicted_s):
            worker.expect(plan)
            _look_ahead(inbox, messages, worker)
            result = worker.run(plan)
        if result is not None:
            inbox.send_result(result)
        if not messages:
            messages.append(inbox.recv())
    return plan


def _look_ahead(inbox: Inbox, messages: deque[Any], worker: Worker) -> None:
    """Announce the plans that have come already; the last message of a call ends it."""
    while inbox.has_message() and (not messages or isinstance(messages[-1], Plan)):
        messages.append(inbox.recv())
        if isinstance(messages[-1], Plan):
            worker.expect(messages[-1])
