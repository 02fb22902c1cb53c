"""How long a step will take: a non-negative linear model of what the step has to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mnemosyne.schedule.work import StepWork

MAX_SAMPLES = 256  # measured steps that a fit looks back on
REFIT_EVERY = 16  # steps between two fits
GAIN_WEIGHT = 0.25  # of the newest step in the running ratio of measured to predicted time


class Predictor(Protocol):
    """Step time from step work; a user's own may take the place of ours."""

    def predict(self, work: StepWork) -> float:
        """Seconds that a step with this work takes. Must not fall when the work grows."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a measured step."""


class LinearPredictor:
    """Non-negative least squares over recent steps, in relative error, with a running gain.

    The coefficients follow slowly, by a fit over the last ``MAX_SAMPLES`` steps; the gain follows
    within a few steps when the machine becomes slower or faster as a whole.
    """

    def __init__(self) -> None:
        self._calibration: list[tuple[tuple[float, ...], float]] = []
        self._samples: deque[tuple[tuple[float, ...], float]] = deque(maxlen=MAX_SAMPLES)
        self._coefficients: tuple[float, ...] = ()
        self._log_gain = 0.0
        self._num_observed = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature of ``StepWork.features``."""
        return self._coefficients

    def fit(self, samples: Sequence[tuple[StepWork, float]]) -> None:
        """Set the coefficients from a sweep of ``(work, seconds)``.

        Raises:
            ValueError: if the sweep is empty or a time is not positive.
        """
        if not samples or min(seconds for _, seconds in samples) <= 0:
            raise ValueError(
                f"samples must hold at least one step of positive time, got {samples!r}; "
                "measure a few steps first"
            )
        self._calibration = [(work.features(), seconds) for work, seconds in samples]
        self._refit()

    def predict(self, work: StepWork) -> float:
        """Seconds for this work; 0 before anything was fitted or observed."""
        if not self._coefficients:
            return 0.0
        return float(np.exp(self._log_gain)) * self._raw(work.features())

    def observe(self, work: StepWork, seconds: float) -> None:
        self._samples.append((work.features(), seconds))
        self._num_observed += 1
        is_young = self._num_observed < REFIT_EVERY and not self._calibration
        if is_young or self._num_observed % REFIT_EVERY == 0:
            self._refit()
        else:
            self._follow(work.features(), seconds)

    def _raw(self, features: tuple[float, ...]) -> float:
        return sum(c * x for c, x in zip(self._coefficients, features, strict=True))

    def _follow(self, features: tuple[float, ...], seconds: float) -> None:
        error = float(np.log(seconds / max(self._raw(features), 1e-9)))
        self._log_gain += GAIN_WEIGHT * (error - self._log_gain)

    def _refit(self) -> None:
        samples = [*self._calibration, *self._samples]
        features = np.array([features for features, _ in samples], dtype=np.float64)
        seconds = np.array([seconds for _, seconds in samples], dtype=np.float64)
        # Rows divided by the measured time: a step that is 10% off counts the same whatever
        # its length. Columns scaled to one, so that the solver sees like magnitudes.
        rows = features / seconds[:, None]
        scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
        solution = nonnegative_least_squares(rows / scale, np.ones(len(samples)))
        self._coefficients = tuple((solution / scale).tolist())
        self._log_gain = 0.0
        for recent in list(self._samples)[-8:]:
            self._follow(*recent)


def nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimise ``|a x - b|`` over ``x >= 0``.

    Args:
        a: float64 ``[rows, columns]``.
        b: float64 ``[rows]``.

    Returns:
        float64 ``[columns]``.

    Source: the active-set method of Lawson and Hanson, Solving Least Squares Problems, 1974.
    """
    num_columns = a.shape[1]
    x = np.zeros(num_columns)
    passive = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.abs(a.T @ b).max()))
    for _ in range(3 * num_columns):
        gradient = np.where(passive, -np.inf, a.T @ (b - a @ x))
        if gradient.max() <= tolerance:
            break
        passive[int(np.argmax(gradient))] = True
        while True:
            trial = np.zeros(num_columns)
            trial[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            blocking = passive & (trial <= 0)
            if not blocking.any():
                break
            # walk from x towards the trial until the first entry reaches zero
            steps = x[blocking] / np.maximum(x[blocking] - trial[blocking], 1e-300)
            x = x + float(steps.min()) * (trial - x)
            passive &= x > tolerance * 1e-3
            x[~passive] = 0.0
        x = trial
    return x
