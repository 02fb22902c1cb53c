"""The predicted time of a step: a non-negative linear model of its work."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Protocol, runtime_checkable

import numpy as np

from mnemosyne.schedule.least_squares import fit_relative
from mnemosyne.schedule.work import StepWork

MAX_SAMPLES = 256  # measured steps that a fit looks back on
REFIT_EVERY = 16  # steps between two fits
GAIN_STEPS = 15  # whose median ratio of measured to fitted time is the gain
KNOWN_AFTER = 64  # steps; until then a sweep that was wrong looks like a change of speed
NEWEST = GAIN_STEPS // 2 + 1  # steps that move the median together
SAME_SPEED = 1.25  # a gain beyond it, up or down, asks for an explanation
BETTER_FIT = 0.9  # error of one fit over that of another, below which it explains better
MIN_STEP_S = 1e-9  # a clock may not have moved
NUM_FEATURES = len(StepWork().features())
# Seconds per unit of each feature on a typical machine; only their ratios count.
ANY_MACHINE = (1e-2, 2e-4, 1e-8, 1e-7, 1e-4, 1e-4, 1e-5, 1e-2)
PRIOR_RANGE = 8.0  # how far off, up or down, rates may be that were given


class Predictor(Protocol):
    """Step time from step work; a user's own may take the place of ours."""

    def predict(self, work: StepWork) -> float:
        """Seconds that a step with this work takes. Must not fall when the work grows."""


@runtime_checkable
class LearningPredictor(Predictor, Protocol):
    """A predictor that learns from measured steps."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a measured step."""


class LinearPredictor:
    """Non-negative least squares over recent steps, in relative error, with a running gain.

    The gain is a median: it follows within ``NEWEST`` steps when the machine as a whole becomes
    slower or faster, and a few stalls do not move it. Where step times scatter, as beside another
    process on the same cores, half of the steps take less than predicted. The coefficients follow
    slowly, by a fit over the last ``MAX_SAMPLES`` steps but the newest.

    Where no sweep is made, what the first steps do not tell is taken from a prior, at the speed
    that they show: after decodes alone a long prompt has a likely time, not one read from noise.
    With the number of steps the prior fades, but for features that none of them had.

    Args:
        prior: seconds per unit of each feature, positive, such as the roofline of a machine gives
            them. Unset: nothing is predicted before a step is observed.
    """

    def __init__(self, prior: Sequence[float] | None = None) -> None:
        self._prior = np.array(ANY_MACHINE if prior is None else prior)
        self._range = np.inf if prior is None else PRIOR_RANGE
        self._calibration = np.empty((0, NUM_FEATURES + 1))  # features, seconds
        self._recent = np.empty((MAX_SAMPLES, NUM_FEATURES + 1))  # a ring
        self._num_observed = 0
        self._explained_at = 0  # steps observed when a change of speed was last considered
        self._coefficients = () if prior is None else tuple(map(float, prior))
        self._ratios: deque[float] = deque(maxlen=GAIN_STEPS)  # measured to fitted
        self._gain = 1.0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature of ``StepWork.features``."""
        return self._coefficients

    @property
    def samples(self) -> np.ndarray:
        """Rows that the next fit is made from: float64 ``[steps, features + 1]``, newest last."""
        return np.concatenate([self._calibration, self._recent[self._places(MAX_SAMPLES)]])

    def fit(self, samples: Sequence[tuple[StepWork, float]]) -> None:
        """Set the coefficients from a sweep of ``(work, seconds)``.

        Raises:
            ValueError: if the sweep is empty or a time is not positive.
        """
        self.fit_rows(np.array([[*work.features(), seconds] for work, seconds in samples]))

    def fit_rows(self, rows: np.ndarray) -> None:
        """The same from float64 ``[steps, features + 1]``, as ``samples`` gives them."""
        if not len(rows) or rows[:, -1].min() <= 0:
            raise ValueError(
                f"samples must hold at least one step of positive time, got {rows.tolist()}; "
                "measure a few steps first"
            )
        self._calibration = rows.copy()
        self._use(fit_relative(self.samples)[0])

    def predict(self, work: StepWork) -> float:
        """Seconds for this work; 0 before anything was given, fitted or observed."""
        if not self._coefficients:
            return 0.0
        return self._gain * work.seconds(self._coefficients)

    def observe(self, work: StepWork, seconds: float) -> None:
        seconds = max(seconds, MIN_STEP_S)
        row = self._recent[self._num_observed % MAX_SAMPLES]
        row[:-1] = work.features()
        row[-1] = seconds
        self._num_observed += 1
        if self._num_observed < 2 * REFIT_EVERY and not len(self._calibration):
            self._use(self._fit(self.samples)[0])
            self._gain = 1.0  # one slow first step, as of kernels being compiled, says nothing yet
            return
        self._follow(seconds / max(work.seconds(self._coefficients), MIN_STEP_S))
        if self._speed_may_have_changed():
            self._refit()
        elif self._num_observed % REFIT_EVERY == 0:
            # without the newest, which may be the first of a machine that has changed
            self._use(self._fit(self.samples[:-NEWEST])[0])

    def _places(self, count: int) -> np.ndarray:
        """The places of the last steps in the ring, at most ``count``, newest last."""
        first = max(0, self._num_observed - min(count, MAX_SAMPLES))
        return np.arange(first, self._num_observed) % MAX_SAMPLES

    def _follow(self, ratio: float) -> None:
        self._ratios.append(ratio)
        self._gain = median(self._ratios)

    def _speed_may_have_changed(self) -> bool:
        is_known = self._num_observed >= KNOWN_AFTER
        is_due = self._num_observed - self._explained_at >= NEWEST
        return is_known and is_due and not 1 / SAME_SPEED <= self._gain <= SAME_SPEED

    def _refit(self) -> None:
        """The newest steps did work of which too little was known, or the machine has changed.

        One fit over steps of two speeds would have a wrong shape: the chunk rule makes small steps
        on a slow machine and large ones on a fast one, of equal time. So if old steps explain the
        new ones clearly better once they are scaled to their speed, they stay scaled.
        """
        self._explained_at = self._num_observed
        rows = self.samples
        rates, error = self._fit(rows)
        rows[:-NEWEST, -1] *= self._gain
        rates_if_changed, error_if_changed = self._fit(rows)
        if error_if_changed < BETTER_FIT * error:
            rates = rates_if_changed
            self._calibration = rows[: len(self._calibration)]
            self._recent[self._places(MAX_SAMPLES)] = rows[len(self._calibration) :]
        self._use(rates)

    def _fit(self, rows: np.ndarray) -> tuple[np.ndarray, float]:
        """Rates and error of a fit; a sweep has every feature, steps alone may not."""
        if len(self._calibration):
            return fit_relative(rows)
        slowdown = float(np.median(rows[:, -1] / (rows[:, :-1] @ self._prior)))
        slowdown = min(max(slowdown, 1 / self._range), self._range)
        return fit_relative(rows, prior=slowdown * self._prior, weight=1 / len(rows))

    def _use(self, rates: np.ndarray) -> None:
        """Take new coefficients, and the gain of the last steps against them."""
        self._coefficients = tuple(rates.tolist())
        last = self._recent[self._places(GAIN_STEPS)]
        fitted = np.maximum(last[:, :-1] @ rates, MIN_STEP_S)
        self._ratios = deque((last[:, -1] / fitted).tolist(), maxlen=GAIN_STEPS)
        self._gain = median(self._ratios) if self._ratios else 1.0


def fit_error(predictor: Predictor, samples: Sequence[tuple[StepWork, float]]) -> float:
    """Median relative error of predictions on ``(work, seconds)``."""
    return median(abs(predictor.predict(work) / seconds - 1) for work, seconds in samples)
