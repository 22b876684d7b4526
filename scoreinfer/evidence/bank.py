"""Evidence from simulations near an observation: whether it is an outlier, and what the proposal misses near it."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.evidence.certificate import ForwardCheck

NUM_NEIGHBOURS = 64
"""Number of simulations near the observation that are checked. Chosen by judgement."""
TRUSTED_SHARE = 0.1
"""A simulation counts if the ESS of the proposals there is above this share of their number. Chosen by judgement."""


class Outliers(NamedTuple):
    """Standardised observations of simulations and their distances to each other, to detect outliers.

    Args:
        features: standardised, flattened observations of the simulations.
        distance: mean distance of each simulation to its nearest neighbours.
    """

    features: Float[Array, "num features"]
    distance: Float[Array, " num"]

    @eqx.filter_jit
    def rank(self, x: Float[Array, " features"]) -> Float[Array, ""]:
        """Compute the distance rank of ``x``: the share of the simulations at least as far from their neighbours."""
        return (self.distance >= neighbour_distance(jnp.linalg.norm(self.features - x, axis=1))).mean()


class ForwardBank(NamedTuple):
    """Weights of simulated truths under a proposal, each at its own simulated observation.

    This evidence is used if there is none at the observation itself.

    Args:
        features: standardised, flattened observations of the simulations.
        log_excess: log(w(z*) / mean proposal weight), with z* the true parameters of the simulation.
        log_share: log(effective sample size / number) of the proposal's draws at the simulated observation.
    """

    features: Float[Array, "num features"]
    log_excess: Float[Array, " num"]
    log_share: Float[Array, " num"]

    @eqx.filter_jit
    def check(self, x: Float[Array, " features"]) -> ForwardCheck:
        """Select the evidence of the simulations nearest to the observation with features ``x``."""
        # Poor weights are visible in themselves. Only good weights can hide a missed mode.
        counts = self.log_share > jnp.log(TRUSTED_SHARE)
        distances = jnp.where(counts, jnp.linalg.norm(self.features - x, axis=1), jnp.inf)
        near = jnp.argsort(distances)[: min(NUM_NEIGHBOURS, distances.size)]
        return ForwardCheck(jnp.where(counts[near], self.log_excess[near], jnp.nan))


def neighbour_distance(distances: Float[Array, " num"], num_nearest: int = 5) -> Float[Array, ""]:
    """Compute the mean of the ``num_nearest`` smallest distances."""
    return -jax.lax.top_k(-distances, min(num_nearest, distances.size))[0].mean()


@eqx.filter_jit
def outliers(features: Float[Array, "num features"]) -> Outliers:
    """Compute the mean distance of each simulation to its nearest neighbours."""

    def alone(i):
        return neighbour_distance(jnp.linalg.norm(features - features[i], axis=1).at[i].set(jnp.inf))

    return Outliers(features, jax.lax.map(alone, jnp.arange(features.shape[0]), batch_size=64))
