"""Ensemble Kalman filters: the Kalman limit, tapers, inflation, gradients."""

import jax
import numpy as np
import pytest

import scoreinfer as si
from filters.linear import AR1, PARTLY, TURN

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
