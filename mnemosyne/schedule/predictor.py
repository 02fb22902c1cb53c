"""How long a step will take: a non-negative linear model of what the step has to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Protocol, runtime_checkable

import numpy as np

from mnemosyne.schedule.work import StepWork

MAX_SAMPLES = 256  # measured steps that a fit looks back on
REFIT_EVERY = 16  # steps between two fits
GAIN_WEIGHT = 0.25  # of the newest step in the running ratio of measured to predicted time
MIN_STEP_S = 1e-9  # a clock may not have moved
NUM_FEATURES = len(StepWork().features())


class Predictor(Protocol):
    """Step time from step work; a user's own may take the place of ours."""

    def predict(self, work: StepWork) -> float:
        """Seconds that a step with this work takes. Must not fall when the work grows."""


@runtime_checkable
class LearningPredictor(Predictor, Protocol):
    """A predictor that is told how long steps really took."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a measured step."""


class LinearPredictor:
    """Non-negative least squares over recent steps, in relative error, with a running gain.

    The coefficients follow slowly, by a fit over the last ``MAX_SAMPLES`` steps; the gain follows
    within a few steps when the machine becomes slower or faster as a whole.
    """

    def __init__(self) -> None:
        self._calibration = np.empty((0, NUM_FEATURES + 1))  # features, seconds
        self._recent = np.empty((MAX_SAMPLES, NUM_FEATURES + 1))  # a ring
        self._num_observed = 0
        self._coefficients: tuple[float, ...] = ()
        self._gain = 1.0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature of ``StepWork.features``."""
        return self._coefficients

    @property
    def samples(self) -> np.ndarray:
        """What the next fit is made from: float64 ``[steps, features + 1]``, seconds last."""
        num_recent = min(self._num_observed, MAX_SAMPLES)
        return np.concatenate([self._calibration, self._recent[:num_recent]])

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
        self._calibration = rows
        self._refit()

    def predict(self, work: StepWork) -> float:
        """Seconds for this work; 0 before anything was fitted or observed."""
        if not self._coefficients:
            return 0.0
        return self._gain * self._raw(work)

    def observe(self, work: StepWork, seconds: float) -> None:
        seconds = max(seconds, MIN_STEP_S)
        row = self._recent[self._num_observed % MAX_SAMPLES]
        row[:-1] = work.features()
        row[-1] = seconds
        self._num_observed += 1
        is_young = self._num_observed < REFIT_EVERY and not len(self._calibration)
        if is_young or self._num_observed % REFIT_EVERY == 0:
            self._refit()
        else:
            self._follow(self._raw(work), seconds)

    def _raw(self, work: StepWork) -> float:
        step, token, pair, key, sequence, sampled, exchanged = self._coefficients
        return (
            step
            + token * work.num_tokens
            + pair * work.prefill_pairs
            + key * work.decode_keys
            + sequence * work.num_sequences
            + sampled * work.num_sampled
            + exchanged * work.num_exchanged
        )

    def _follow(self, raw_s: float, seconds: float) -> None:
        error = seconds / max(raw_s, MIN_STEP_S) / self._gain
        self._gain *= math.exp(GAIN_WEIGHT * math.log(error))

    def _refit(self) -> None:
        rows = self.samples
        seconds = rows[:, -1]
        # Rows divided by the measured time: a step that is 10% off counts the same whatever
        # its length. Columns scaled to one, so that the solver sees like magnitudes.
        a: np.ndarray = rows[:, :-1] / seconds[:, None]
        scale = np.maximum(a.max(axis=0), 1e-30)
        # The triangle of a QR decomposition has the same solution and far fewer rows.
        both = np.column_stack([a / scale, np.ones(len(a))])
        triangle = np.asarray(np.linalg.qr(both, mode="r"))
        solution = nonnegative_least_squares(triangle[:, :-1], triangle[:, -1])
        self._coefficients = tuple((solution / scale).tolist())
        self._gain = 1.0
        num_recent = min(self._num_observed, 8)
        for index in range(self._num_observed - num_recent, self._num_observed):
            row = self._recent[index % MAX_SAMPLES]
            self._follow(float(row[:-1] @ self._coefficients), float(row[-1]))


def fit_error(predictor: Predictor, samples: Sequence[tuple[StepWork, float]]) -> float:
    """Median relative error of predictions on ``(work, seconds)``."""
    return median(abs(predictor.predict(work) / seconds - 1) for work, seconds in samples)


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
