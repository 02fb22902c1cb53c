"""Claims about the step-time predictor."""

import numpy as np
import pytest

from mnemosyne.schedule.predictor import LinearPredictor, nonnegative_least_squares
from mnemosyne.schedule.work import StepWork

COSTS = np.array([2e-3, 1e-5, 3e-9, 2e-8, 1e-4, 2e-4, 5e-6])  # seconds per feature


def _work(rng: np.random.Generator) -> StepWork:
    chunk, context, decodes = rng.integers(1, 4096), rng.integers(0, 10**6), rng.integers(0, 64)
    return StepWork(
        num_tokens=int(chunk + decodes),
        prefill_pairs=float(chunk * context),
        decode_keys=float(decodes * context),
        num_sequences=int(decodes + 1),
        num_sampled=int(decodes),
        num_exchanged=int(rng.integers(0, 512)),
    )


def _seconds(work: StepWork, factor: float = 1.0) -> float:
    return factor * float(np.dot(COSTS, work.features()))


def test_the_fit_recovers_a_linear_machine():
    rng = np.random.default_rng(0)
    predictor = LinearPredictor()

    predictor.fit([(work, _seconds(work)) for work in (_work(rng) for _ in range(40))])

    for work in (_work(rng) for _ in range(100)):
        assert predictor.predict(work) == pytest.approx(_seconds(work), rel=1e-6)


def test_the_gain_recovers_within_a_dozen_steps_when_the_machine_halves_its_speed():
    rng = np.random.default_rng(1)
    predictor = LinearPredictor()
    predictor.fit([(work, _seconds(work)) for work in (_work(rng) for _ in range(40))])

    for work in (_work(rng) for _ in range(12)):
        predictor.observe(work, _seconds(work, factor=2.0))

    work = _work(rng)
    assert predictor.predict(work) == pytest.approx(_seconds(work, factor=2.0), rel=0.05)


def test_it_learns_from_steps_alone():
    rng = np.random.default_rng(2)
    predictor = LinearPredictor()
    assert predictor.predict(_work(rng)) == 0.0

    for work in (_work(rng) for _ in range(64)):
        predictor.observe(work, _seconds(work))

    errors = [abs(predictor.predict(w) / _seconds(w) - 1) for w in (_work(rng) for _ in range(50))]
    assert np.median(errors) < 0.01


def test_the_prediction_never_falls_when_the_work_grows():
    rng = np.random.default_rng(3)
    predictor = LinearPredictor()
    noisy = [(w, _seconds(w) * rng.uniform(0.5, 2)) for w in (_work(rng) for _ in range(30))]

    predictor.fit(noisy)

    assert min(predictor.coefficients) >= 0
    for work in (_work(rng) for _ in range(50)):
        assert predictor.predict(work + _work(rng)) >= predictor.predict(work)


def test_an_empty_sweep_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        LinearPredictor().fit([])


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_meets_its_optimality_conditions(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=20)

    x = nonnegative_least_squares(a, b)

    gradient = a.T @ (b - a @ x)
    assert x.min() >= 0
    assert gradient.max() <= 1e-9
    assert np.abs(gradient * x).max() <= 1e-9
