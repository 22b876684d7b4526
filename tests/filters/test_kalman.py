"""Ensemble Kalman filters: the Kalman limit, tapers, inflation, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import linalg, stats

import scoreinfer as si
from filters.linear import AR1, PARTLY, TURN
from scoreinfer.filters.base import Members
from scoreinfer.filters.spectral import inverse_and_root
from scoreinfer.model.states import read_space

NUM = 4000
METHODS = [si.filters.EnKF(), si.filters.LETKF(), si.filters.ScoreFilter(inflation=1.0, jumps=None)]


@pytest.mark.parametrize("method", METHODS, ids=["EnKF", "LETKF", "ScoreFilter"])
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


# --- one analysis: tapers, inflation, relaxation


def analysed(method, x, seen=(0, 1, 2)):
    """Analyse members once; entry i observes component seen[i]."""
    space = si.StateSpace(
        dist.Normal(jnp.zeros(3), 1.0).to_event(1),
        lambda t0, t1, x: x,
        lambda t, x: dist.Normal(x[jnp.array(seen)], 0.5),
    )
    observed = read_space(space, np.ones((1, len(seen)))).model.observed
    members = Members(jnp.asarray(x, jnp.float32), jnp.zeros(len(x)))
    y = jnp.linspace(1.0, -1.0, len(seen))
    return np.asarray(method.analyse(jax.random.key(3), (), jnp.ones(()), members, observed, y)[1].members.x)


X = np.random.default_rng(1).multivariate_normal(np.zeros(3), 0.5 * np.eye(3) + 0.5, size=12)


@pytest.mark.parametrize("make", [si.filters.EnKF, si.filters.LETKF])
def test_a_taper_of_ones_changes_nothing_and_one_of_zeros_parts_components(make):
    np.testing.assert_allclose(analysed(make(taper=np.ones((3, 3))), X), analysed(make(), X), atol=1e-4)
    local = analysed(make(taper=np.eye(3)), X)
    assert np.abs(local - analysed(make(), X)).max() > 0.1
    other = X.copy()
    other[:, 1:] = other[::-1, 1:]  # other components, and other correlations with them
    np.testing.assert_allclose(analysed(make(taper=np.eye(3)), other)[:, 0], local[:, 0], atol=1e-5)
    unseen = analysed(make(taper=lambda i, j: (i == j).astype(float)), X, seen=(0,))
    np.testing.assert_allclose(unseen[:, 1:], X[:, 1:], atol=1e-5)


def test_local_analyses_are_those_of_one_component():
    """Mean and variance of a component that only its own observation informs are Kalman's, of the sample moments."""
    found = analysed(si.filters.LETKF(taper=np.eye(3)), X)
    variance, y = X.var(axis=0, ddof=1), np.array([1.0, 0.0, -1.0])
    gain = variance / (variance + 0.25)
    np.testing.assert_allclose(found.mean(axis=0), X.mean(axis=0) + gain * (y - X.mean(axis=0)), atol=1e-4)
    np.testing.assert_allclose(found.var(axis=0, ddof=1), (1 - gain) * variance, rtol=1e-3)


@pytest.mark.parametrize("num", [3, 40], ids=["fewer members than entries", "more"])
def test_the_evidence_of_the_transform_is_that_of_a_gaussian_also_where_entries_are_taken_one_after_the_other(num):
    """Against SciPy's density of the innovation; a taper of ones leaves Vecchia's factors exact."""
    x, y = np.random.default_rng(2).standard_normal((num, 6)).cumsum(axis=1), np.linspace(1.0, -2.0, 6)
    y[2] = np.nan
    space = si.StateSpace(
        dist.Normal(jnp.zeros(6), 1.0).to_event(1), lambda t0, t1, x: x, lambda t, x: dist.Normal(x, 0.5)
    )
    observed = read_space(space, np.ones((1, 6))).model.observed
    members, has = Members(jnp.asarray(x, jnp.float32), jnp.zeros(num)), ~np.isnan(y)
    covariance = np.cov(x[:, has].T) + 0.25 * np.eye(has.sum())
    exact = stats.multivariate_normal(x[:, has].mean(axis=0), covariance).logpdf(y[has])
    for method in (si.filters.LETKF(), si.filters.LETKF(np.ones((6, 6)))):
        found = method.analyse(jax.random.key(0), (), jnp.ones(()), members, observed, jnp.asarray(y))[1].log_evidence
        assert float(found) == pytest.approx(exact, abs=1e-3)


def test_a_locality_is_a_taper():
    ring = si.filters.grid((3,), 1.0, half_width=0.8)
    for make in (si.filters.EnKF, si.filters.LETKF):
        np.testing.assert_allclose(analysed(make(ring), X), analysed(make(ring.taper), X))
    method = si.filters.LETKF(si.filters.grid((5,), 1.0))
    with pytest.raises(ValueError, match="locality must have 2 points"):
        si.filter(jax.random.key(0), TURN.space(), method=method, num_members=5, y=TURN.simulate(0, 2))


def test_inflation_and_relaxation_are_as_defined():
    sd = lambda x: x.std(axis=0)  # noqa: E731
    plain = analysed(si.filters.LETKF(), X)
    stretched = X.mean(axis=0) + 1.3 * (X - X.mean(axis=0))
    inflated = analysed(si.filters.LETKF(inflation=1.3), X)
    np.testing.assert_allclose(inflated, analysed(si.filters.LETKF(), stretched), atol=1e-4)
    relaxed = analysed(si.filters.LETKF(relaxation=0.4), X)
    np.testing.assert_allclose(sd(relaxed), 0.4 * sd(X) + 0.6 * sd(plain), rtol=1e-3)
    np.testing.assert_allclose(relaxed.mean(axis=0), plain.mean(axis=0), atol=1e-5)
    whole = analysed(si.filters.LETKF(relaxation=1.0), X)
    np.testing.assert_allclose(sd(whole), sd(X), rtol=1e-3)


def test_more_entries_than_members_and_fewer_agree():
    """Two ways to invert: five members see three entries, or the same three twice, each with half of its weight."""
    few = X[:5]
    np.testing.assert_allclose(analysed(si.filters.LETKF(), few), twice(few), atol=1e-3)


def twice(x):
    space = si.StateSpace(
        dist.Normal(jnp.zeros(3), 1.0).to_event(1),
        lambda t0, t1, x: x,
        lambda t, x: dist.Normal(jnp.concatenate([x, x]), 0.5 * np.sqrt(2)),
    )
    observed = read_space(space, np.ones((1, 6))).model.observed
    assert observed.component == (0, 1, 2, 0, 1, 2)
    members, y = Members(jnp.asarray(x, jnp.float32), jnp.zeros(len(x))), jnp.tile(jnp.linspace(1.0, -1.0, 3), 2)
    return si.filters.LETKF().analyse(jax.random.key(3), (), jnp.ones(()), members, observed, y)[1].members.x
