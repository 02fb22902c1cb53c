"""Executors of an engine's plans: the worker of this process, or all ranks of a mesh."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Plan, StepResult

log = logging.getLogger(__name__)


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
        """Run a step; ``collect`` gives its result, a failed one without memory for its rows.

        Where memory does not suffice to copy or restore pages, those of requests without rows in
        the step may be wrong: the error is raised.
        """
        try:
            result = self.worker.run(plan)
        except (MemoryError, RuntimeError) as error:
            if not (_is_out_of_memory(error) and self.worker.has_followed(plan)):
                raise
            log.warning("memory ran out in step %d: %s", plan.index, error)
            reason = (
                f"memory must suffice for a step, got one of {plan.num_tokens} tokens for which it "
                "did not; lower schedule.max_chunk, schedule.max_sequences or cache.max_tokens"
            )
            result = StepResult(plan.index, error=reason)
        assert result is not None, "the only rank reports every step"
        self._results.append(result)

    def collect(self) -> StepResult:
        """The result of the oldest step not yet collected."""
        return self._results.popleft()


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or a CPU; torch has no type for the latter."""
    is_ours = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_ours or "can't allocate memory" in str(error)


class Crew(Protocol):
    """The other ranks, as the driver sees them."""

    def send_plan(self, plan: Plan) -> None:
        """Hand a plan to every other rank."""

    def recv_result(self) -> StepResult:
        """Wait for one group's result of one step."""

    def watch_step(self, index: int, predicted_s: float) -> AbstractContextManager[None]:
        """The context in which a step runs: it ends all ranks if the step fails or gets stuck."""


class MeshExecutor:
    """The driver's executor: plans go to every rank, one result comes back from each group.

    Submitting computes the driver's own stage and returns while later stages are still at work,
    so up to ``depth`` steps are under way.

    Args:
        worker: the driver's own rank.
        crew: the others.
        num_groups: degree of the kvp axis.
        num_stages: degree of the pp axis.
        num_ranks: of the mesh; all of them say what they restored.
    """

    def __init__(
        self, worker: Worker, crew: Crew, *, num_groups: int, num_stages: int, num_ranks: int
    ) -> None:
        self.worker = worker
        self.depth = num_stages
        self._crew = crew
        self._num_groups, self._num_ranks = num_groups, num_ranks
        self._in_flight: deque[Plan] = deque()  # oldest first
        self._parts: dict[int, list[StepResult]] = {}

    def submit(self, plan: Plan) -> None:
        """Send a plan out and compute the driver's part of it."""
        with self._crew.watch_step(plan.index, plan.predicted_s):
            self._crew.send_plan(plan)
            self._in_flight.append(plan)
            self._parts[plan.index] = []
            result = self.worker.run(plan)
            if result is not None:
                self._parts[plan.index].append(result)

    def collect(self) -> StepResult:
        """Wait for all groups to be done with the oldest step."""
        plan = self._in_flight[0]
        num_parts = self._num_ranks if plan.restores else self._num_groups
        with self._crew.watch_step(plan.index, plan.predicted_s):
            while len(self._parts[plan.index]) < num_parts:
                result = self._crew.recv_result()
                self._parts[result.index].append(result)
        self._in_flight.popleft()
        return _joined(self._parts.pop(plan.index))


def _joined(parts: list[StepResult]) -> StepResult:
    """One result of a step; each request is reported by one group, and is whole if all say so."""
    whole = StepResult(parts[0].index, broken=tuple(i for part in parts for i in part.broken))
    for part in parts:
        whole.sampled.update(part.sampled)
        whole.prompt_logprobs.update(part.prompt_logprobs)
        for request_id, count in part.restored.items():
            whole.restored[request_id] = min(count, whole.restored.get(request_id, count))
    return whole
