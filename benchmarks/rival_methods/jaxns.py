"""Nested sampling (jaxns 3), which turns on double precision."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxns.core import NestedSampler
from jaxns.model import Model
from jaxns.priors import Prior
from tensorflow_probability.substrates import jax as tfp

from rival_methods import WIDE_FUNNEL, Outcome

SETTINGS = {"root_allocation_degree": 1000}
TUNED = {"funnel_10": {"scales": WIDE_FUNNEL}}


def prepare(target) -> Callable[[int], Outcome]:
    """Make the model: uniform draws of the unit cube, mapped to the prior."""
    own = SETTINGS | TUNED.get(target.name, {})

    def theta_of(u):
        return target.from_unit(jnp.clip(u, 1e-6, 1 - 1e-6))

    def prior_model():
        ones = jnp.ones(target.dim)
        return target.log_likelihood(theta_of(Prior(tfp.distributions.Uniform(0.0 * ones, ones), name="u").realise()))

    model, constrain = Model(prior_model=prior_model), jax.jit(jax.vmap(theta_of))

    def run(seed: int) -> Outcome:
        sampler = NestedSampler(model=model, root_allocation_degree=own["root_allocation_degree"])
        found = sampler.run(key=jax.random.PRNGKey(seed)).to_result().trim()
        weights = np.exp(np.asarray(found.log_dp) - float(np.max(found.log_dp)))
        draws = np.asarray(constrain(found.X_samples["u"]))
        num = int(found.total_num_likelihood_evaluations)
        return Outcome(draws, weights, float(found.log_Z_mean), num)

    return run
