"""The worker as an executor: what the engine hands its plans to."""

from __future__ import annotations

from collections import deque

from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Plan, StepResult


class LocalExecutor:
    """Runs every step at once, in this process.

    Args:
        worker: the only rank.
    """

    depth = 1  # steps that may be in flight

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._results: deque[StepResult] = deque()

    def submit(self, plan: Plan) -> None:
        """Run a step; ``collect`` gives its result."""
        self._results.append(self.worker.run(plan))

    def collect(self) -> StepResult:
        """The result of the oldest step not yet collected."""
        return self._results.popleft()
