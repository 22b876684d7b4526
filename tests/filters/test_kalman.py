"""Ensemble Kalman filters: the Kalman limit, tapers, inflation, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

import scoreinfer as si
from filters.linear import AR1, PARTLY, TURN
from scoreinfer.filters.spectral import inverse_and_root

NUM = 4000
METHODS = [si.filters.EnKF(), si.filters.LETKF()]


@pytest.mark.parametrize("method", METHODS, ids=["EnKF", "LETKF"])
@pytest.mark.parametrize("linear", [AR1, TURN, PARTLY])
def test_kalman_limit(linear, method):
    """Means within five standard errors, covariances within those of N members, at every time."""
    y = linear.simulate(0, 10)
    y[4] = np.nan
    y[5, 0] = np.nan
    means, covs, log_evidence = linear.kalman(y)
    run = si.filter(jax.random.key(0), linear.space(), method=method, num_members=NUM, y=y)
    sd = np.sqrt(np.diagonal(covs, axis1=1, axis2=2))
    found = np.einsum("tni,tnj->tij", *[np.asarray(run.analysis.x - run.mean()[:, None], np.float64)] * 2) / (NUM - 1)
    scale = np.sqrt(covs**2 + np.einsum("ti,tj->tij", sd**2, sd**2))
    # Errors of earlier times are carried on, damped: 3 is more than the sum of the geometric series.
    assert np.abs((np.asarray(run.mean()) - means) / sd).max() < 5 * np.sqrt(3 / NUM)
    assert np.abs((found - covs) / scale).max() < 5 * np.sqrt(3 / NUM)
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=5 * np.sqrt(10 / NUM))


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (0.5, 2.0, 2.0), (0.3, 1.0, 7.0)])
def test_roots_have_gradients_where_eigenvalues_coincide(values):
    """Against differences of SciPy's functions in double precision, in a direction that splits the eigenvalues."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    matrix, change = turn @ np.diag(values) @ turn.T, np.array([[0.2, 0.5, 0.1], [0.5, -0.3, 0.4], [0.1, 0.4, 0.6]])
    found = jax.jvp(inverse_and_root, (jnp.asarray(matrix, jnp.float32),), (jnp.asarray(change, jnp.float32),))
    exact = lambda m: (np.linalg.inv(m), np.linalg.inv(linalg.sqrtm(m)))  # noqa: E731
    ends = [exact(matrix + step * change) for step in (-1e-5, 1e-5)]
    for value, slope, truth, low, high in zip(*found, exact(matrix), *ends, strict=True):
        np.testing.assert_allclose(value, truth, atol=1e-4)
        np.testing.assert_allclose(slope, (high - low) / 2e-5, atol=1e-2)
