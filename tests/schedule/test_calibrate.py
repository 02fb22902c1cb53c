"""The sweep at start-up: what it asks of an executor, and what a predictor learns from it."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import pages_for
from mnemosyne.schedule.calibrate import Limits, calibrate
from mnemosyne.schedule.plan import Plan, StepResult
from mnemosyne.schedule.predictor import LinearPredictor, fit_error
from mnemosyne.schedule.work import StepWork, WorkModel

WORK_MODEL = WorkModel([None, 512])
COSTS = np.array([3e-3, 2e-5, 1e-9, 4e-9, 1e-4, 2e-4, 0.0, 0.0])  # seconds per feature
ROOMY = Limits(
    num_pages=2**16, kinds=PageKinds(16), max_positions=2**20, vocab_size=100, step_s=float("inf")
)


class Machine:
    """An executor on a clock: linear in the work, five times as slow when a shape is new."""

    depth = 1

    def __init__(self) -> None:
        self.now_s = 0.0
        self.plans: list[Plan] = []
        self.pages: dict[int, np.ndarray] = {}
        self.tokens: dict[int, int] = {}
        self._warm: set[tuple[int, ...]] = set()
        self._results: deque[StepResult] = deque()

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        for request_id in plan.released:
            del self.pages[request_id], self.tokens[request_id]
        for request_id, table in plan.tables:
            (extent,) = table.extents
            assert not set(extent.pages) & {p for pages in self.pages.values() for p in pages}
            self.pages[request_id] = extent.pages
        for admission in plan.admitted:
            self.tokens[admission.request_id] = len(admission.prompt_ids)
        work = WORK_MODEL.nothing[0]
        for chunk in plan.chunks:
            assert chunk.stop <= self.tokens[chunk.request_id] + chunk.is_decode
            self.tokens[chunk.request_id] += chunk.is_decode
            work += WORK_MODEL.chunk(
                chunk.start, chunk.num_tokens, samples=chunk.samples, is_decode=chunk.is_decode
            )
        shape = tuple(chunk.num_tokens for chunk in plan.chunks)
        self.now_s += seconds_of(work) * (1 if shape in self._warm else 5)
        self._warm.add(shape)
        self._results.append(StepResult(plan.index))

    def collect(self) -> StepResult:
        return self._results.popleft()


def seconds_of(work: StepWork) -> float:
    return float(np.dot(COSTS, work.features()))


def sweep(machine: Machine, limits: Limits) -> list[tuple[StepWork, float]]:
    return calibrate(machine, WORK_MODEL, limits, clock=lambda: machine.now_s)


def test_a_predictor_fitted_from_the_sweep_knows_steps_it_never_saw() -> None:
    machine, predictor = Machine(), LinearPredictor()

    predictor.fit(sweep(machine, ROOMY))

    rng = np.random.default_rng(0)
    for _ in range(100):
        start, chunk = int(rng.integers(0, 30_000)), int(rng.integers(32, 8192))
        work = WORK_MODEL.chunk(start, chunk, samples=False, is_decode=False)
        for _ in range(int(rng.integers(0, 12))):
            work += WORK_MODEL.chunk(start, 1, samples=True, is_decode=True)
        assert predictor.predict(work) == pytest.approx(seconds_of(work), rel=0.02)


def test_the_first_run_of_a_shape_does_not_count() -> None:
    samples = sweep(Machine(), ROOMY)

    assert [seconds for _, seconds in samples] == pytest.approx([seconds_of(w) for w, _ in samples])


def test_the_executor_is_empty_afterwards() -> None:
    machine = Machine()

    sweep(machine, ROOMY)

    assert machine.pages == {}
    assert machine.plans[-1].chunks == ()


def test_requests_of_the_sweep_are_told_apart_from_real_ones() -> None:
    machine = Machine()

    sweep(machine, ROOMY)

    assert max(c.request_id for plan in machine.plans for c in plan.chunks) < 0


@pytest.mark.parametrize("num_pages", [3, 40, 700])
@pytest.mark.parametrize("max_positions", [64, 5000, 2**20])
def test_the_sweep_stays_within_cache_and_model(num_pages: int, max_positions: int) -> None:
    machine = Machine()
    limits = Limits(
        num_pages=num_pages,
        kinds=PageKinds(16),
        max_positions=max_positions,
        vocab_size=7,
        step_s=1e9,
    )

    samples = sweep(machine, limits)

    admitted = [admission for plan in machine.plans for admission in plan.admitted]
    pages = [table.pages_on(0) for plan in machine.plans for _, table in plan.tables]
    assert max(map(max, pages)) < num_pages
    assert max(a.prompt_ids.max() for a in admitted) < 7
    assert max(c.stop for plan in machine.plans for c in plan.chunks) <= max_positions
    for plan in machine.plans:
        for chunk in plan.chunks:
            assert pages_for(chunk.stop, 16) <= max(map(len, pages))
    assert samples


def test_a_tiny_cache_gives_no_samples() -> None:
    limits = Limits(num_pages=1, kinds=PageKinds(16), max_positions=1024, vocab_size=7, step_s=1.0)

    assert sweep(Machine(), limits) == []


def test_a_sweep_ends_with_its_first_step_that_takes_too_long() -> None:
    limits = replace(ROOMY, step_s=0.02)  # 512 tokens take 14 ms, 2048 take 45 ms

    samples = sweep(Machine(), limits)

    assert [work.num_tokens for work, _ in samples[:6]] == [32, 128, 512, 2048, 32, 256]
    assert max(work.num_tokens for work, _ in samples) == 2048


class Disturbed(Machine):
    """Something else takes the machine in two of three steps."""

    def submit(self, plan: Plan) -> None:
        before_s = self.now_s
        super().submit(plan)
        if len(self.plans) % 3:
            self.now_s += 1.5 * (self.now_s - before_s)


def test_what_else_the_machine_does_in_between_is_not_learned() -> None:
    limits = replace(ROOMY, step_s=0.05)

    samples = sweep(Disturbed(), limits)

    brief = [(work, seconds) for work, seconds in samples if seconds_of(work) < 0.05]
    assert len(brief) > 8
    undisturbed = [seconds_of(work) for work, _ in brief]
    # a decode sees a key more in each repeat
    assert [seconds for _, seconds in brief] == pytest.approx(undisturbed, rel=1e-4)


def test_the_error_of_a_fit_tells_a_sweep_that_was_disturbed_throughout() -> None:
    rng = np.random.default_rng(0)
    samples = sweep(Machine(), ROOMY)
    disturbed = [(work, seconds * rng.uniform(1, 6)) for work, seconds in samples]
    quiet_fit, disturbed_fit = LinearPredictor(), LinearPredictor()

    quiet_fit.fit(samples)
    disturbed_fit.fit(disturbed)

    assert fit_error(quiet_fit, samples) < 1e-6
    assert fit_error(disturbed_fit, disturbed) > 0.1
