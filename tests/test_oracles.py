"""The oracles against themselves: their draws, their evidences and NumPyro's own densities must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import condition, seed, trace
from numpyro.infer.util import log_density, log_likelihood
from scipy import stats
from scipy.special import logsumexp

from oracles import disagreement, linear_gaussian, oracles, prior_draws

ORACLES = {oracle.name: oracle for oracle in oracles()}
SMALL = [name for name in ORACLES if name != "linear_gaussian_10"]


@pytest.mark.parametrize("name", ORACLES)
def test_exact_draws_have_the_exact_moments(name):
    oracle = ORACLES[name]
    for data in [oracle.data, *prior_draws(oracle, jax.random.key(1), 2)[1]]:
        truth = oracle.truth(data)
        assert disagreement(truth, truth.sample(np.random.default_rng(1), 20_000)) < 5


@pytest.mark.parametrize("name", SMALL)
def test_weighted_prior_draws_give_posterior_and_evidence(name):
    """The likelihood of prior draws, both from the model itself, leads to the answers."""
    oracle, num = ORACLES[name], 40_000

    def prior(key):
        sites = trace(seed(condition(oracle.model, oracle.data), key)).get_trace()
        return {latent: sites[latent]["value"] for latent in oracle.latents}

    draws = jax.vmap(prior)(jax.random.split(jax.random.key(2), num))
    terms = log_likelihood(oracle.model, draws, **oracle.data)
    log_weight = sum(np.asarray(t, np.float64).reshape(num, -1).sum(1) for t in terms.values())
    weight = np.exp(log_weight - log_weight.max())
    ess = weight.sum() ** 2 / np.sum(weight**2)
    truth = oracle.truth(oracle.data)
    assert ess > 1000
    assert abs(logsumexp(log_weight) - np.log(num) - truth.log_evidence) < 5 * np.sqrt(1 / ess - 1 / num)
    assert disagreement(truth, oracle.flat(draws), log_weight) < 5


@pytest.mark.parametrize("dim", [2, 10, 50])
def test_joint_over_posterior_is_the_evidence(dim):
    oracle = linear_gaussian(dim)
    truth = oracle.truth(oracle.data)
    data = {name: jnp.asarray(value) for name, value in oracle.data.items()}
    for theta in truth.sample(np.random.default_rng(3), 4):
        joint = log_density(oracle.model, (), data, {"theta": jnp.asarray(theta)})[0]
        posterior = stats.multivariate_normal(truth.mean, truth.covariance).logpdf(theta)
        assert float(joint) - posterior == pytest.approx(truth.log_evidence, abs=2e-3)


def test_disagreement_finds_a_missing_mode():
    oracle = ORACLES["gaussian_mixture"]
    truth = oracle.truth(oracle.data)
    draws = truth.sample(np.random.default_rng(4), 4000)
    assert 0.2 < truth.regions[0].probability < 0.8
    assert disagreement(truth, draws[draws[:, 0] > 0]) > 20


def test_disagreement_finds_a_wrong_scale():
    oracle = ORACLES["linear_gaussian_2"]
    truth = oracle.truth(oracle.data)
    draws = truth.sample(np.random.default_rng(5), 4000)
    assert disagreement(truth, truth.mean + 1.2 * (draws - truth.mean)) > 5
