"""Claims about the least squares behind step times."""

import numpy as np
import pytest

from mnemosyne.schedule.least_squares import fit_relative, nonnegative_least_squares


def test_a_fit_finds_the_rates_whatever_the_length_of_a_step():
    rng = np.random.default_rng(0)
    rates = np.array([2e-3, 1e-9, 3e-5])
    features = np.exp(rng.uniform(0, 15, size=(30, 3)))

    found, error = fit_relative(np.column_stack([features, features @ rates]))

    assert found == pytest.approx(rates, rel=1e-6)
    assert error < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_meets_its_optimality_conditions(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=20)

    x = nonnegative_least_squares(a, b)

    gradient = a.T @ (b - a @ x)
    assert x.min() >= 0
    assert gradient.max() <= 1e-9
    assert np.abs(gradient * x).max() <= 1e-9
