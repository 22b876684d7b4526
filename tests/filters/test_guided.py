"""The guided filter: exact weights for every law, and as good as the exact proposal where that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from filters.linear import AR1, PARTLY
from filters.test_particle import LAWS, grid_answer, moments_off
from scoreinfer.filters.guided import propose
from scoreinfer.markov import Sees
from scoreinfer.process.base import Gaussian
from scoreinfer.score.sites import Sites, cavities

PRECISE = PARTLY._replace(error=0.05)


def test_moments_are_those_of_the_kalman_filter():
    y = PRECISE.simulate(1, 8)
    y[3] = np.nan
    means, covs, log_evidence = PRECISE.kalman(y)
    run = si.filter(jax.random.key(0), PRECISE.space(), method=si.filters.GuidedFilter(), num_members=4000, y=y)
    assert moments_off(run, means, covs) < 5
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=0.2)


@pytest.mark.parametrize("name", LAWS)
def test_evidence_is_unbiased_for_every_law(name):
    """The mean of exp(log evidence) over many runs of four particles, of one state and one observation."""
    law, y, log_likelihood = LAWS[name]
    truth = grid_answer(log_likelihood)[2]
    space = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: dist.Normal(0.9 * x, 0.6), law)
    method = si.filters.GuidedFilter(defence=0.3)

    @jax.jit
    def evidences(keys):
        run = lambda key: si.filter(key, space, method=method, num_members=4, y=np.array([y])).log_evidence  # noqa: E731
        return jax.lax.map(run, keys, batch_size=500)

    ratio = np.exp(np.asarray(evidences(jax.random.split(jax.random.key(2), 4000)), np.float64) - truth)
    error = ratio.std() / np.sqrt(4000)
    assert abs(ratio.mean() - 1.0) < 5 * error and error < 0.02


def test_proposal_is_the_exact_posterior_of_a_linear_observation():
    observed = si.filter(
        jax.random.key(0),
        PRECISE.space(),
        method=si.filters.GuidedFilter(),
        num_members=3,
        y=np.ones((1, 1)),
    ).series.model.observed
    assert observed.kinds == (Sees.LINEAR,)
    mean, sd, y = np.array([0.3, -0.8]), np.array([0.4, 0.7]), np.array([0.9])
    found = propose(observed, jnp.array(1.0), Gaussian(jnp.asarray(mean), jnp.asarray(sd)), jnp.asarray(y))
    covariance = np.linalg.inv(np.diag(1 / sd**2) + PRECISE.see.T @ PRECISE.see / PRECISE.error**2)
    expected = covariance @ (mean / sd**2 + PRECISE.see.T @ y / PRECISE.error**2)
    np.testing.assert_allclose(found.mean, expected, atol=2e-3)
    np.testing.assert_allclose(found.factor @ found.factor.T, covariance, atol=2e-3)
    np.testing.assert_allclose(found.inverse @ found.factor, np.eye(2), atol=1e-3)
    peak = found.log_density(found.mean)
    assert float(peak) == pytest.approx(-np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(covariance)[1], abs=0.02)


def test_models_without_gaussian_noise_are_refused():
    space = si.StateSpace(AR1.space().initial, lambda key, t0, t1, x: x, AR1.space().observation)
    with pytest.raises(ValueError, match="needs a transition with independent Gaussian noise"):
        si.filter(jax.random.key(0), space, method=si.filters.GuidedFilter(), num_members=10, y=np.ones((2, 1)))


def test_the_predictive_has_not_seen_the_observation():
    """It is the same whatever is observed, and its moments are those of the Kalman filter's forecast."""
    model, y = AR1._replace(error=0.1), np.array([[2.5], [-1.5]], np.float32)
    run, other = (
        si.filter(jax.random.key(0), model.space(), method=si.filters.GuidedFilter(), num_members=20_000, y=data)
        for data in (y, y - [[0.0], [1.0]])
    )
    np.testing.assert_array_equal(run.predictive.u, other.predictive.u)
    np.testing.assert_array_equal(run.predictive.log_weight, other.predictive.log_weight)
    means, covs, _ = model.kalman(y)
    exact_mean = model.move[0, 0] * np.array([0.0, means[0, 0]])
    exact_sd = np.sqrt(model.move[0, 0] ** 2 * np.array([1.0, covs[0, 0, 0]]) + model.noise**2)
    weight, u = jax.nn.softmax(run.predictive.log_weight, axis=1), run.predictive.u[:, :, 0]
    mean = (weight * u).sum(1)
    sd, ess = np.sqrt((weight * (u - mean[:, None]) ** 2).sum(1)), 1 / (weight**2).sum(1)
    assert ess.min() > 500
    assert (abs(mean - exact_mean) < 5 * exact_sd / np.sqrt(ess)).all()
    assert (abs(sd / exact_sd - 1) < 5 / np.sqrt(2 * ess)).all()


def test_cavities_keep_their_digits_where_sites_are_precise():
    """In single precision, sites a thousand times narrower than the prior, one of them absent."""
    covariance = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.3], [0.2, 0.3, 1.0]])
    mean, aim, precision = np.array([0.1, 0.0, -0.3]), np.array([0.7, -1.2, 0.0]), np.array([1e6, 4e6, 0.0])
    sites = Sites(*(jnp.asarray(value, jnp.float32) for value in (precision, precision * aim)))
    found = cavities(jnp.asarray(mean, jnp.float32), jnp.asarray(covariance, jnp.float32), sites)
    for i in range(3):
        seen = [j for j in range(2) if j != i]
        near = covariance[np.ix_(seen, seen)] + np.diag(1.0 / precision[seen])
        gain = np.linalg.solve(near, covariance[seen, i])
        assert float(found[0][i]) == pytest.approx(mean[i] + gain @ (aim - mean)[seen], abs=1e-4)
        assert float(found[1][i]) == pytest.approx(covariance[i, i] - gain @ covariance[seen, i], rel=1e-4)
