"""flowMC: many chains, MALA moves between global ones by a spline flow, which is trained on the chains."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flowMC.resource_strategy_bundle.RQSpline_MALA import RQSpline_MALA_Bundle
from flowMC.Sampler import Sampler

from rival_methods import Outcome

SETTINGS = {
    "n_chains": 200, "n_local_steps": 50, "n_global_steps": 20, "n_training_loops": 20, "n_production_loops": 5,
    "n_epochs": 10, "mala_step_size": 0.1, "learning_rate": 1e-3, "batch_size": 2000,
}  # fmt: skip
FLOOR = -1e5
"""Least log density: chains that start behind a crescent must be able to leave."""


def prepare(target) -> Callable[[int], Outcome]:
    """Keep one density for all runs; a bundle of flow and chains is made anew for each, as its state is used up."""
    num_chains = SETTINGS["n_chains"]
    start = jax.jit(lambda key: target.start(key, num_chains))
    constrain = jax.jit(jax.vmap(lambda z: target.constrain(z)[0]))

    def log_density(z, data):
        return jnp.maximum(jnp.nan_to_num(sum(target.unconstrained(z)), nan=FLOOR), FLOOR)

    def run(seed: int) -> Outcome:
        for_start, for_bundle, key = jax.random.split(jax.random.key(seed), 3)
        bundle = RQSpline_MALA_Bundle(for_bundle, n_dims=target.dim, logpdf=log_density, **SETTINGS)
        sampler = Sampler(n_dim=target.dim, n_chains=num_chains, rng_key=key, resource_strategy_bundles=bundle,
                          checkpoint_interval=0)  # fmt: skip
        sampler.sample(start(for_start), {})
        states = np.asarray(sampler.resources["positions_production"].data)
        rows = np.asarray(constrain(states.reshape(-1, target.dim)), float)
        steps = SETTINGS["n_local_steps"] + SETTINGS["n_global_steps"]
        num = num_chains * steps * (SETTINGS["n_training_loops"] + SETTINGS["n_production_loops"])
        return Outcome(rows, num_evaluations=num, chains=rows.reshape(num_chains, -1, target.dim))

    return run
