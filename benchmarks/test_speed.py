"""Speed of each stage on two_moons (pytest-benchmark, medians), and the floor the hardware sets.

    taskset -c 0 python -m pytest benchmarks/test_speed.py -o addopts="" --benchmark-columns=median,iqr,rounds

Compilation is warmed up before every measurement and printed apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measure import Clock
from numpyro.infer import MCMC
from tasks import two_moons

import scoreinfer as si

NUM = 10_000
Y = np.array([-0.64, 0.16], np.float32)
KEY = jax.random.key(0)


@pytest.fixture(scope="session")
def posterior():
    """Train at 10,000 simulations and say where the time went."""
    with Clock() as clock:
        posterior = si.NPSE(two_moons, num_simulations=NUM, progress_bar=False).fit(KEY)
    print(f"\ntraining: {clock.times}")
    return posterior


def test_train(benchmark, posterior):
    """A second training of the same design: what of it is not compilation."""
    with Clock() as clock:
        npse = si.NPSE(two_moons, num_simulations=NUM, progress_bar=False)
        benchmark.pedantic(npse.fit, (jax.random.key(1),), rounds=1)
    benchmark.extra_info["compile_seconds"] = clock.times.compile


def test_simulate(benchmark, posterior):
    simulate = jax.jit(jax.vmap(posterior.problem.simulate))
    keys = jax.random.split(KEY, NUM)
    jax.block_until_ready(simulate(keys))
    benchmark(lambda: jax.block_until_ready(simulate(keys)))


def test_draw_weighted(benchmark, posterior):
    posterior.sample(KEY, NUM, y=Y)
    benchmark(lambda: jax.block_until_ready(posterior.sample(KEY, NUM, y=Y).log_weight))


def test_draw_corrected(benchmark, posterior):
    conditioned, options = posterior.condition(y=Y), {"max_proposals": 4 * NUM}
    conditioned.sample(KEY, NUM, **options)
    benchmark(lambda: jax.block_until_ready(conditioned.sample(KEY, NUM, **options).unconstrained))


def test_weigh(benchmark, posterior):
    """The density alone, for as many draws."""
    draws = posterior.sample(KEY, NUM, y=Y)
    density = jax.jit(jax.vmap(posterior.problem.log_joint, in_axes=(0, None)))
    jax.block_until_ready(density(draws.unconstrained, draws.observed))
    benchmark(lambda: jax.block_until_ready(density(draws.unconstrained, draws.observed)))


def test_new_observation_costs_no_compilation(posterior):
    posterior.sample(KEY, NUM, y=Y)
    with Clock() as clock:
        posterior.sample(KEY, NUM, y=Y + 0.05)
    assert clock.times.num_compilations == 0


def test_kernel(benchmark, posterior):
    """A thousand iterations of four chains, compiled, on data of its own each time."""
    mcmc = MCMC(
        si.ScoreSDE(posterior=posterior), num_warmup=0, num_samples=1000, num_chains=4, chain_method="vectorized",
        progress_bar=False, jit_model_args=True,
    )  # fmt: skip
    mcmc.run(KEY, y=Y)
    benchmark(lambda: (mcmc.run(KEY, y=Y), jax.block_until_ready(mcmc.get_samples())))


def test_floor_matrix_products(benchmark):
    """The network's products alone: one 128 x 128 layer over a batch of 10,000; 2 x 128^2 x 10,000 operations."""
    weights, batch = jnp.ones((128, 128)), jnp.ones((NUM, 128))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(batch, weights))
    benchmark(lambda: jax.block_until_ready(product(batch, weights)))
    benchmark.extra_info["gigaflops"] = 2 * 128**2 * NUM / benchmark.stats["median"] / 1e9
