"""Linear models of step times whose rates are not negative."""

from __future__ import annotations

import numpy as np


def fit_relative(
    rows: np.ndarray, prior: np.ndarray | None = None, weight: float = 0.0
) -> tuple[np.ndarray, float]:
    """Rates that give the measured times with the least squared relative error.

    Args:
        rows: float64 ``[steps, features + 1]``, positive seconds last.
        prior: rates to keep to where the steps do not tell, positive, float64 ``[features]``.
        weight: of an error of 1 in one of them against an error of 1 in one step.

    Returns:
        Seconds per unit of each feature, float64 ``[features]``, and the mean relative error.
    """
    # Rows divided by the measured time: a step that is 10% off counts the same whatever its
    # length. Columns scaled to one, so that the solver sees like magnitudes.
    a: np.ndarray = rows[:, :-1] / rows[:, -1:]
    all_a, b = a, np.ones(len(a))
    if prior is not None:
        all_a = np.concatenate([a, np.diag(weight / prior)])
        b = np.concatenate([b, np.full(len(prior), weight)])
    scale = np.maximum(all_a.max(axis=0), 1e-30)
    # The triangle of a QR decomposition has the same solution and far fewer rows.
    both = np.column_stack([all_a / scale, b])
    triangle = np.asarray(np.linalg.qr(both, mode="r"))
    rates = nonnegative_least_squares(triangle[:, :-1], triangle[:, -1]) / scale
    return rates, float(np.abs(a @ rates - 1).mean())


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
