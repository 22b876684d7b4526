"""Particle marginal Metropolis-Hastings: exact for few particles, against Kalman's likelihood on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

import scoreinfer as si
from filters.linear import AR1
from scoreinfer.mcmc import ParticleMarginal

Y = AR1.simulate(5, 12)
NUM_PARTICLES = 8
"""Few: the standard deviation of the log evidence is above one."""


def model(y):
    slope = numpyro.sample("slope", dist.Uniform(-1.0, 1.0))
    space = si.StateSpace(
        dist.Normal(jnp.zeros(1), 1.0).to_event(1),
        lambda t0, t1, x: dist.Normal(slope * x, AR1.noise).to_event(1),
        lambda t, x: dist.Normal(x, AR1.error).to_event(1),
    )
    method = si.filters.BootstrapFilter()
    run = si.filter(numpyro.prng_key(), space, method=method, num_members=NUM_PARTICLES, y=y)
    numpyro.factor("y", run.log_evidence)


@pytest.mark.always
def test_parameters_have_their_posterior_whatever_the_number_of_particles():
    mcmc = MCMC(ParticleMarginal(model), num_warmup=500, num_samples=20_000, progress_bar=False)
    mcmc.run(jax.random.key(1), Y)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["slope"], float)
    grid = (np.arange(-200, 200) + 0.5) / 200
    density = np.exp([AR1._replace(move=np.array([[s]])).kalman(Y)[2] for s in grid])
    weight = density / density.sum()
    mean, ess = weight @ grid, effective_sample_size(draws)
    sd = np.sqrt(weight @ grid**2 - mean**2)
    assert ess > 300 and 0.05 < float(mcmc.last_state.mean_accept_prob) < 0.5
    assert abs(draws.mean() - mean) < 5 * sd / np.sqrt(ess)
    for level in (0.1, 0.5, 0.9):  # the whole law
        place = grid[np.searchsorted(np.cumsum(weight), level)]
        assert abs((draws < place).mean() - level) < 5 * np.sqrt(level * (1 - level) / ess) + weight.max()


def test_vectorised_chains_are_refused():
    with pytest.raises(ValueError, match="expected one random key"):
        ParticleMarginal(model).init(jax.random.split(jax.random.key(0), 2), 10, None, (Y,), {})
