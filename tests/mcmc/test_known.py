"""A new kernel of the same model takes the problem that an earlier one has read, with its compiled programs."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

import scoreinfer as si
from compilations import Compilations
from scoreinfer.mcmc.known import _KNOWN, problem_of_model, problem_of_potential

SCALE = [1.0]


def model(y):
    a = numpyro.sample("a", dist.Normal(0.0, SCALE[0]))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def potential(x):
    return 0.5 * jnp.sum((x / SCALE[0]) ** 2)


def test_a_problem_is_known_as_long_as_its_model_and_its_programs_are(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", [1.0])
    first, bare = problem_of_model(model, (1.0,), {}), problem_of_potential(potential, np.zeros(2))
    assert problem_of_model(model, (2.0,), {}) is first  # other data
    assert problem_of_potential(potential, np.ones(2)) is bare
    assert problem_of_potential(potential, np.ones(3)) is not bare
    SCALE[0] = 2.0  # another density
    assert problem_of_model(model, (1.0,), {}) is not first
    wide = problem_of_potential(potential, np.zeros(2))
    assert wide.log_likelihood(jnp.ones(2), {}) == -0.25


def test_what_nobody_holds_is_forgotten():
    def own(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("a", dist.Normal()), 1.0), obs=y)

    number = id(problem_of_model(own, (1.0,), {}))
    jax.clear_caches()
    gc.collect()
    assert number not in _KNOWN


def test_a_second_kernel_of_the_same_density_compiles_nothing_but_numpyros_loop():
    def learn(seed):
        kernel = si.ScoreSDE(potential_fn=potential, progress_bar=False)
        mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
        mcmc.run(jax.random.key(seed), init_params=jnp.zeros(2))
        return mcmc

    learn(0)
    with Compilations() as compilations:
        learn(1)
    assert compilations.count <= 3
