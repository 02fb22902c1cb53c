"""Executors take plans of the engine: several chunks of a prompt are under way in a pipeline."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from mnemosyne.request import Sampled, SamplingParams
from mnemosyne.runtime.executor import MeshExecutor
from mnemosyne.schedule.plan import Plan, Restore, StepResult
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.intake import Intake
from tests.schedule.clocked import make_scheduler, tokens_of


class FirstStage:
    """The driver's rank of a pipeline: it computes its part and has nothing to report."""

    def run(self, plan: Plan) -> None:
        return None


class LaterStages:
    """The other ranks: each group answers a plan once it is asked, the newest group first."""

    def __init__(self, num_groups: int) -> None:
        self.under_way: list[list[int]] = []  # chunks not yet answered, as each answer is asked for
        self._num_groups = num_groups
        self._plans: deque[Plan] = deque()
        self._answers: deque[StepResult] = deque()

    def send_plan(self, plan: Plan) -> None:
        self._plans.append(plan)

    def recv_result(self) -> StepResult:
        self.under_way.append([chunk.start for plan in self._plans for chunk in plan.chunks])
        if not self._answers:
            plan = self._plans.popleft()
            sampled = {request_id: Sampled(7) for request_id in tokens_of(plan)}
            self._answers.extend([StepResult(plan.index)] * (self._num_groups - 1))
            self._answers.append(StepResult(plan.index, sampled))
        return self._answers.popleft()

    def watch_step(self, index: int, predicted_s: float) -> AbstractContextManager[None]:
        return nullcontext()


def _serve(num_stages: int, num_groups: int = 1) -> tuple[list[list[int]], list[int]]:
    """A prompt of 40 tokens in chunks of 8: what was under way, and the tokens that came."""
    crew = LaterStages(num_groups)
    executor = MeshExecutor(
        FirstStage(),  # type: ignore[arg-type]
        crew,
        num_groups=num_groups,
        num_stages=num_stages,
        num_ranks=num_stages * num_groups,
    )
    intake = Intake(
        vocab_size=100,
        max_positions=1000,
        defaults=GenerationDefaults(),
        tokenizer=None,
        model="none",
    )
    engine = Engine(make_scheduler(depth=executor.depth, chunk=8), executor, intake)
    (output,) = engine.add(np.arange(40), SamplingParams(max_tokens=2))
    while engine.has_work:
        engine.step()
    return crew.under_way, output.token_ids


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_as_many_chunks_of_a_prompt_are_under_way_as_there_are_stages(num_stages: int) -> None:
    under_way, _ = _serve(num_stages)

    starts = [0, 8, 16, 24, 32]
    assert under_way[:5] == [starts[step : step + num_stages] for step in range(5)]
    assert under_way[5:] == [[40]], "a decode waits for its token"


def test_a_step_is_over_when_every_group_has_answered() -> None:
    under_way, token_ids = _serve(num_stages=2, num_groups=3)

    assert len(under_way) == 3 * 6
    assert token_ids == [7, 7]


def test_a_leaf_is_whole_where_it_is_on_every_rank() -> None:
    plan = Plan(0, (), restores=(Restore(5, 0, 4, 0), Restore(6, 2, 3, 0)))
    crew = LaterStages(num_groups=1)
    crew._answers.extend([StepResult(0, restored={5: n, 6: 1}) for n in (4, 2, 3)])
    executor = MeshExecutor(
        FirstStage(),  # type: ignore[arg-type]
        crew,
        num_groups=1,
        num_stages=1,
        num_ranks=3,
    )

    executor.submit(plan)

    assert executor.collect().restored == {5: 2, 6: 1}
