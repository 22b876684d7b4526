"""What simulations near an observation say: whether it is an outlier, and what a proposal misses at theirs."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.evidence.certificate import ForwardCheck

NUM_NEIGHBOURS = 64
TRUSTED_SHARE = 0.1
"""Least effective share of the proposals at a simulation for its truth to count."""


class Outliers(NamedTuple):
    """Standardised observations of simulations, and the distance of each to its nearest others: what outliers are.

    Args:
        features: standardised, flattened observations.
        distance: distance of each to its nearest others.
    """

    features: Float[Array, "num features"]
    distance: Float[Array, " num"]

    @eqx.filter_jit
    def rank(self, x: Float[Array, " features"]) -> Float[Array, ""]:
        """Compute the share of the simulations that lie at least as far from the others as ``x`` does."""
        return (self.distance >= neighbour_distance(jnp.linalg.norm(self.features - x, axis=1))).mean()


class ForwardBank(NamedTuple):
    """Simulations held against a proposal, each at its own observation: what is known where none is at the one at hand.

    Args:
        features: standardised, flattened observations.
        log_excess: log(w(z*) / mean proposal weight) of the truth z* each came from.
        log_share: log(effective sample size / number) of the proposals there.
    """

    features: Float[Array, "num features"]
    log_excess: Float[Array, " num"]
    log_share: Float[Array, " num"]

    @eqx.filter_jit
    def check(self, x: Float[Array, " features"]) -> ForwardCheck:
        """Look up the evidence near the observation with features ``x``."""
        # Where the proposal's own weights are poor they say so; only good-looking weights can hide a missed mode.
        counts = self.log_share > jnp.log(TRUSTED_SHARE)
        distances = jnp.where(counts, jnp.linalg.norm(self.features - x, axis=1), jnp.inf)
        near = jnp.argsort(distances)[: min(NUM_NEIGHBOURS, distances.size)]
        return ForwardCheck(jnp.where(counts[near], self.log_excess[near], jnp.nan))


def neighbour_distance(distances: Float[Array, " num"], num_nearest: int = 5) -> Float[Array, ""]:
    """Compute the mean distance to the nearest of them."""
    return -jax.lax.top_k(-distances, min(num_nearest, distances.size))[0].mean()


@eqx.filter_jit
def outliers(features: Float[Array, "num features"]) -> Outliers:
    """Compute the distance of each simulation to its nearest others."""

    def alone(i):
        return neighbour_distance(jnp.linalg.norm(features - features[i], axis=1).at[i].set(jnp.inf))

    return Outliers(features, jax.lax.map(alone, jnp.arange(features.shape[0]), batch_size=64))
