"""Nested sampling (dynesty) in the unit cube, its density compiled by JAX and called point by point."""

from collections.abc import Callable

import dynesty
import jax
import numpy as np

from rival_methods import WIDE_FUNNEL, Outcome

SETTINGS = {"nlive": 1000, "bound": "multi", "sample": "auto"}
TUNED = {"funnel_10": {"nlive": 500, "scales": WIDE_FUNNEL}, "many_well_5": {"sample": "rslice"}}


def prepare(target) -> Callable[[int], Outcome]:
    """Compile the density of the unit cube: one call for a point."""
    own = SETTINGS | TUNED.get(target.name, {})

    def inside(u):
        return target.from_unit(jax.numpy.clip(u, 1e-6, 1 - 1e-6))

    density, constrain = jax.jit(lambda u: target.log_likelihood(inside(u))), jax.jit(jax.vmap(inside))

    def run(seed: int) -> Outcome:
        sampler = dynesty.NestedSampler(
            lambda u: max(float(density(u.astype(np.float32))), -1e30), lambda u: u, target.dim, nlive=own["nlive"],
            bound=own["bound"], sample=own["sample"], rstate=np.random.default_rng(seed),
        )  # fmt: skip
        sampler.run_nested(print_progress=False)
        found = sampler.results
        draws = np.asarray(constrain(found.samples.astype(np.float32)), float)
        return Outcome(draws, found.importance_weights(), float(found.logz[-1]), int(np.sum(found.ncall)))

    return run
