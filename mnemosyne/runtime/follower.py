"""What every rank but the driver does: take plans, compute its part, report."""

from __future__ import annotations

from typing import Any, Protocol

from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Plan, StepResult


class Inbox(Protocol):
    """The follower's end of the control channel."""

    def recv(self) -> Any:
        """The next plan, or whatever ends this call."""

    def send_result(self, result: StepResult) -> None:
        """Report what this rank's group made of a step."""


def follow(inbox: Inbox, worker: Worker) -> Any:
    """Run plans until the driver says something else.

    Args:
        inbox: where plans come from and results go.
        worker: this rank's part of the model.

    Returns:
        The message that was no plan.
    """
    while True:
        message = inbox.recv()
        if not isinstance(message, Plan):
            return message
        result = worker.run(message)
        if result is not None:
            inbox.send_result(result)
