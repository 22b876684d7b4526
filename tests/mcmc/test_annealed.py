"""Annealed Langevin dynamics: its own closed form on a Gaussian, modes' weights, the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import MCMC

import scoreinfer as si
from scoreinfer.score import GaussianScore, MixtureScore

KEY = jax.random.key(0)


def run(kernel, num=500, chains=8, chain_method="vectorized", **kwargs):
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num, num_chains=chains, chain_method=chain_method, progress_bar=False)
    mcmc.run(KEY, **kwargs)
    return mcmc


def test_gaussian_variance_is_that_of_the_recursion():
    """Every step is linear, so mean and variance of a draw are known to the last digit, bias and all."""
    variance, mean = 0.5, 30.0
    options = {"max_level": 2.0, "min_level": 0.5, "num_levels": 4, "num_steps": 3, "step_size": 0.8}
    score = GaussianScore(jnp.full(1, mean), variance * jnp.eye(1))
    draws = np.asarray(run(si.mcmc.AnnealedLangevin(score=score, dim=1, **options)).get_samples(), np.float64)
    expected, spread = 0.0, options["max_level"] ** 2
    for level in np.repeat(np.geomspace(2.0, 0.5, 4), 3):
        keep = 1 - 0.4 * level**2 / (variance + level**2)
        expected, spread = mean + keep * (expected - mean), keep**2 * spread + 0.8 * level**2
    error = np.sqrt(spread / draws.size)
    assert abs(draws.mean() - expected) < 4 * error
    assert abs(draws.var() - spread) < 4 * spread * np.sqrt(2 / draws.size)
    # The walk is far from done: the test can tell its law from the target's.
    assert abs(expected - mean) > 20 * error
    assert abs(spread - variance - 0.25) > 10 * spread * np.sqrt(2 / draws.size)


def test_modes_get_their_weights():
    score = MixtureScore(jnp.array([0.3, 0.7]), jnp.array([[-4.0, 0.0], [4.0, 0.0]]), jnp.full(2, 0.3))
    draws = np.asarray(run(si.mcmc.AnnealedLangevin(score=score, dim=2)).get_samples())
    assert abs((draws[:, 0] < 0).mean() - 0.3) < 4 * np.sqrt(0.21 / len(draws)) + 0.01  # and some bias
    assert abs(np.abs(draws[:, 0]).mean() - 4.0) < 0.05
    assert abs(draws[:, 1].std() - 0.3) < 0.03


def test_chain_methods_agree():
    kernel = si.mcmc.AnnealedLangevin(score=GaussianScore(jnp.zeros(2), jnp.eye(2)), dim=2, num_levels=3, num_steps=2)
    first, *others = (
        run(kernel, 5, 2, method).get_samples(group_by_chain=True)
        for method in ("vectorized", "sequential", "parallel")
    )
    assert first.shape == (2, 5, 2)
    for other in others:
        assert np.allclose(first, other, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"score": GaussianScore(jnp.zeros(1), jnp.eye(1))}, {"dim": 2}])
def test_needs_a_score(options):
    with pytest.raises(ValueError, match="Expected either"):
        si.mcmc.AnnealedLangevin(**options)
