"""What every rank but the driver does: take plans, compute its part, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Plan, StepResult

Watch = Callable[[int, float], AbstractContextManager[None]]  # of a step: index, predicted seconds


class Inbox(Protocol):
    """The follower's end of the control channel."""

    def recv(self) -> Any:
        """The next plan, or whatever ends this call."""

    def send_result(self, result: StepResult) -> None:
        """Report what this rank's group made of a step."""


def follow(inbox: Inbox, worker: Worker, watch: Watch) -> Any:
    """Run plans until the driver says something else.

    Args:
        inbox: where plans come from and results go.
        worker: this rank's part of the model.
        watch: makes the context in which a step runs.

    Returns:
        The message that was no plan.
    """
    while True:
        message = inbox.recv()
        if not isinstance(message, Plan):
            return message
        with watch(message.index, message.predicted_s):
            result = worker.run(message)
        if result is not None:
            inbox.send_result(result)
