"""What the examples hold their draws against."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import k2_24_velocities as k2_24
import toy_process_holzschuh2023 as toy


@pytest.mark.parametrize("num_planets", [1, 2])
def test_linear_parameters_are_integrated_out(num_planets):
    """The log likelihood of a period grid is that of the Gaussian which amplitudes and offset leave behind."""
    time, velocity, error = k2_24.read()
    phase = 2 * np.pi * time[:, None] / np.array([20.9, 42.4])[:num_planets]
    basis = np.concatenate([np.ones((32, 1)), np.cos(phase), np.sin(phase)], axis=1)
    covariance = np.diag(error**2 + 2.5**2) + k2_24.AMPLITUDE**2 * basis @ basis.T
    expected = multivariate_normal(np.zeros(32), covariance).logpdf(velocity)
    found = k2_24.marginal_likelihood(basis[None], velocity, error, 2.5)
    assert found == pytest.approx([expected], rel=1e-6)


def test_aliases_do_not_see_the_planets_order():
    aliases = k2_24.Aliases(*k2_24.exact(2, 60)[:3])
    assert aliases.shares.sum() == pytest.approx(1.0)
    pairs = np.array([[20.9, 42.4], [42.4, 20.9], [5.0, 5.1]])
    first, second, third = aliases.of(pairs)
    assert first == second != third
    assert " and " in aliases.name(first)


def test_toy_process_has_its_published_answers():
    """P(+1 | x_T) on the grid, as computed elsewhere by Fokker-Planck (.533, .571, .606), of Euler steps here."""
    truth = toy.exact(0.002)
    assert truth.density.sum(1) * 0.002 == pytest.approx(np.ones(501), abs=1e-6)
    found = [truth.probability(end) for end in (0.0, *toy.ENDS[1:])]
    assert found == pytest.approx([0.5, 0.533, 0.571, 0.606], abs=0.003)
    x = np.linspace(-1.1, 1.1, 12)
    assert np.asarray(toy.grow(0.0, toy.STEP, toy.decay(0.0, toy.STEP, x))) == pytest.approx(x, abs=1e-5)
    assert toy.q_metric(np.array([1.0, -1.05, 0.5, 0.95])) == 0.5
