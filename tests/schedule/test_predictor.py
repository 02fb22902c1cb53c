"""Claims about the step-time predictor."""

import numpy as np
import pytest

from mnemosyne.schedule.chunking import solve_chunk
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.work import StepWork

COSTS = np.array([2e-3, 1e-5, 3e-9, 2e-8, 1e-4, 2e-4, 5e-6, 3e-2])  # seconds per feature


def _work(rng: np.random.Generator) -> StepWork:
    chunk, context, decodes = rng.integers(1, 4096), rng.integers(0, 10**6), rng.integers(0, 64)
    return StepWork(
        num_tokens=int(chunk + decodes),
        prefill_pairs=float(chunk * context),
        decode_keys=float(decodes * context),
        num_sequences=int(decodes + 1),
        num_sampled=int(decodes),
        num_exchanged=int(rng.integers(0, 512)),
        unread=0.999 ** int(chunk + decodes),
    )


def _seconds(work: StepWork, factor: float = 1.0) -> float:
    return factor * float(np.dot(COSTS, work.features()))


def test_the_fit_recovers_a_linear_machine():
    rng = np.random.default_rng(0)
    predictor = LinearPredictor()

    predictor.fit([(work, _seconds(work)) for work in (_work(rng) for _ in range(40))])

    for work in (_work(rng) for _ in range(100)):
        assert predictor.predict(work) == pytest.approx(_seconds(work), rel=1e-6)


def _calibrated(rng: np.random.Generator) -> LinearPredictor:
    predictor = LinearPredictor()
    predictor.fit([(work, _seconds(work)) for work in (_work(rng) for _ in range(40))])
    return predictor


def _errors(predictor: LinearPredictor, seconds: float, works: list[StepWork]) -> np.ndarray:
    """Relative errors where every step takes ``seconds`` times what it should; it learns."""
    errors = []
    for work in works:
        actual_s = _seconds(work, seconds)
        errors.append(abs(predictor.predict(work) / actual_s - 1))
        predictor.observe(work, actual_s)
    return np.array(errors)


def test_it_recovers_within_a_dozen_steps_when_the_speed_changes_and_changes_back():
    rng = np.random.default_rng(1)
    predictor = _calibrated(rng)
    _errors(predictor, 1.0, [_work(rng) for _ in range(100)])

    slower = _errors(predictor, 2.0, [_work(rng) for _ in range(50)])
    again = _errors(predictor, 1.0, [_work(rng) for _ in range(50)])

    assert slower[12:].max() < 0.05
    assert again[12:].max() < 0.05


def test_a_stall_changes_no_prediction():
    rng = np.random.default_rng(4)
    predictor = _calibrated(rng)
    _errors(predictor, 1.0, [_work(rng) for _ in range(100)])

    for _ in range(10):
        stalled = _work(rng)
        predictor.observe(stalled, _seconds(stalled, factor=10.0))
        errors = _errors(predictor, 1.0, [_work(rng) for _ in range(25)])
        assert errors.max() < 0.05


def test_where_step_times_scatter_half_of_the_steps_take_less_than_predicted():
    rng = np.random.default_rng(5)
    predictor = _calibrated(rng)
    ratios = []

    for work in (_work(rng) for _ in range(400)):
        stalls = 2.5 if rng.random() < 0.35 else 1.0
        actual_s = _seconds(work, 1.5 * stalls * float(np.exp(0.1 * rng.standard_normal())))
        ratios.append(actual_s / predictor.predict(work))
        predictor.observe(work, actual_s)

    assert np.median(ratios[50:]) == pytest.approx(1.0, abs=0.05)


def test_what_the_sweep_got_wrong_about_one_kind_of_step_is_no_change_of_speed():
    rng = np.random.default_rng(6)
    prefills = [StepWork(256, 256.0 * start, 0.0, 1, 0) for start in range(0, 64_000, 1000)]
    decodes = [StepWork(4, 0.0, 4e5 + 4 * step, 4, 4) for step in range(64)]
    sweep = [*prefills[::4], StepWork(4, 0.0, 400000.0, 4, 4)]
    predictor = LinearPredictor()
    predictor.fit([(work, _seconds(work) - 1e-8 * work.decode_keys) for work in sweep])

    _errors(predictor, 1.0, decodes)
    errors = _errors(predictor, 1.0, [prefills[i] for i in rng.permutation(64)])

    assert errors[0] < 0.1
    assert np.median(errors) < 0.02


@pytest.mark.parametrize("slowdown", [1.3, 2.0, 3.0])
def test_adaptive_chunks_keep_to_their_target_on_a_machine_of_another_speed(slowdown):
    """The chunk rule makes steps of equal time, small or large ones as the speed has it."""
    rng = np.random.default_rng(7)
    predictor = _calibrated(rng)
    target_s, taken_s = 0.1, []

    for step in range(600):
        start, num_decodes = int(rng.integers(0, 100)) * 100, int(rng.integers(1, 6))
        beside = StepWork(num_decodes, 0.0, 3000.0 * num_decodes, num_decodes, num_decodes)

        def with_chunk(size: int, start: int = start, beside: StepWork = beside) -> StepWork:
            return beside + StepWork(size, size * (start + size / 2), 0.0, 1, 0)

        size = solve_chunk(
            lambda size, with_chunk=with_chunk: predictor.predict(with_chunk(size)),
            remaining=10**6,
            budget_s=target_s,
        )
        factor = slowdown if 200 <= step < 400 else 1.0
        actual_s = _seconds(with_chunk(size), factor * float(np.exp(0.03 * rng.standard_normal())))
        taken_s.append(actual_s)
        predictor.observe(with_chunk(size), actual_s)

    for first in (220, 250, 350, 420, 450, 550):
        times_s = np.array(taken_s[first : first + 50])
        assert 0.9 * target_s < np.median(times_s) < 1.02 * target_s
        assert np.percentile(times_s, 95) < 1.1 * target_s


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


def _decode(num_keys: int) -> StepWork:
    return StepWork(1, 0.0, float(num_keys), 1, 1)


def _chunk(start: int, num_tokens: int) -> StepWork:
    return StepWork(num_tokens, num_tokens * (start + (num_tokens + 1) / 2), 0.0, 1, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_prompt", [1, 5, 20])
@pytest.mark.parametrize("prior", [None, tuple(COSTS)])
def test_after_a_short_prompt_and_its_decodes_a_long_one_is_no_matter_of_days(
    num_prompt, seed, prior
):
    noise, predictor = np.random.default_rng(seed), LinearPredictor(prior)

    predictor.observe(_chunk(0, num_prompt), 0.05 + 0.01 * noise.random())
    for step in range(60):
        predictor.observe(_decode(num_prompt + step), 0.045 + 0.01 * noise.random())
        assert 0.05 < predictor.predict(_chunk(0, 8192)) < 60
        assert predictor.predict(_chunk(100_000, 8192)) < 600
    assert predictor.predict(_decode(num_prompt + 60)) == pytest.approx(0.05, rel=0.1)


def test_what_was_given_is_predicted_before_any_step_and_scaled_by_the_first_ones():
    predictor = LinearPredictor(COSTS.tolist())
    assert predictor.predict(_chunk(1000, 64)) == pytest.approx(_seconds(_chunk(1000, 64)))

    for keys in range(500, 510):
        predictor.observe(_decode(keys), 3 * _seconds(_decode(keys)))

    unseen = _chunk(1000, 64)
    assert predictor.predict(unseen) == pytest.approx(3 * _seconds(unseen), rel=0.1)


def test_a_first_step_in_which_kernels_are_compiled_is_not_taken_for_the_machine():
    predictor = LinearPredictor(COSTS.tolist())

    predictor.observe(_decode(1), 1000.0)
    assert predictor.predict(_chunk(0, 1000)) < 10 * _seconds(_chunk(0, 1000))

    for keys in range(2, 40):
        predictor.observe(_decode(keys), 100 * _seconds(_decode(keys)))
    assert predictor.predict(_decode(40)) == pytest.approx(100 * _seconds(_decode(40)), rel=0.05)


def test_a_prior_that_is_wrong_fades_with_the_steps():
    rng = np.random.default_rng(8)
    wrong = COSTS * np.exp(rng.uniform(-2, 2, len(COSTS)))
    predictor = LinearPredictor(wrong.tolist())

    for work in (_work(rng) for _ in range(64)):
        predictor.observe(work, _seconds(work))

    errors = [abs(predictor.predict(w) / _seconds(w) - 1) for w in (_work(rng) for _ in range(50))]
    assert np.median(errors) < 0.01


def test_a_sweep_takes_the_place_of_the_prior():
    rng = np.random.default_rng(9)
    sweep = [(work, _seconds(work)) for work in (_work(rng) for _ in range(40))]
    fitted, corrected = LinearPredictor(), LinearPredictor((COSTS[::-1] * 7).tolist())
    for predictor in (fitted, corrected):
        predictor.fit(sweep)

    assert corrected.coefficients == fitted.coefficients
