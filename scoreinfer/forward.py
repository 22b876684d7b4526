"""Forward evidence: what simulated truths say of a proposal, which its own draws cannot."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._typing import Key, Sites
from scoreinfer.certificate import ForwardCheck
from scoreinfer.correct import log_effective_share
from scoreinfer.nets.embedding import flatten
from scoreinfer.proposal import Proposal, draw, weigh

NUM_NEIGHBOURS = 64
TRUSTED_SHARE = 0.1
"""Least effective share of the proposals at a simulation for its truth to count."""


class ForwardBank(NamedTuple):
    """Joint simulations held against the proposal, kept for the forward check of every observation.

    Args:
        features: standardised, flattened observations.
        distance: distance of each to its nearest fellows.
        log_excess: log(w(z*) / mean proposal weight) of the truth z* each came from; NaN without a density.
        log_share: log(effective sample size / number) of the proposals there; minus infinity without a density.
        truth: the truth z* in the whitened space of its own observation.
    """

    features: Float[Array, "num features"]
    distance: Float[Array, " num"]
    log_excess: Float[Array, " num"]
    log_share: Float[Array, " num"]
    truth: Float[Array, "num dim"]

    def nearest(
        self, x: Float[Array, " features"], allowed: Bool[Array, " num"] | bool = True
    ) -> tuple[Int[Array, " neighbours"], Float[Array, " num"]]:
        """Find the allowed simulations nearest to an observation with features ``x``, and all distances."""
        distances = jnp.linalg.norm(self.features - x, axis=1)
        order = jnp.argsort(jnp.where(allowed, distances, jnp.inf))
        return order[: min(NUM_NEIGHBOURS, distances.size)], distances

    @eqx.filter_jit
    def check(self, x: Float[Array, " features"]) -> ForwardCheck:
        """Look up the evidence near the observation with features ``x``."""
        # Where the proposal's own weights are poor they say so; only good-looking weights can hide a missed mode.
        counts = self.log_share > jnp.log(TRUSTED_SHARE)
        near, distances = self.nearest(x, counts)
        rank = (self.distance >= neighbour_distance(distances)).mean()
        return ForwardCheck(jnp.where(counts[near], self.log_excess[near], jnp.nan), rank)


class Ends(NamedTuple):
    """Standardised ends of simulated paths, and the distance of each to its nearest fellows."""

    features: Float[Array, "num features"]
    distance: Float[Array, " num"]

    def rank(self, x: Float[Array, " features"]) -> Float[Array, ""]:
        """Compute the share of the ends that lie at least as far from the others as ``x`` does."""
        return (self.distance >= neighbour_distance(jnp.linalg.norm(self.features - x, axis=1))).mean()

    def ratio(self, x: Float[Array, " features"]) -> Float[Array, ""]:
        """Compute how many times as far from the ends ``x`` lies as these, by their median, from each other."""
        return neighbour_distance(jnp.linalg.norm(self.features - x, axis=1)) / jnp.median(self.distance)


def neighbour_distance(distances: Float[Array, " num"], num_nearest: int = 5) -> Float[Array, ""]:
    """Compute the mean distance to the nearest of them."""
    return -jax.lax.top_k(-distances, min(num_nearest, distances.size))[0].mean()


@eqx.filter_jit
def forward_bank(key: Key, proposal: Proposal, num: int = 512, num_proposals: int = 24) -> ForwardBank:
    """Simulate joint draws (z*, y*) and weigh each truth z* under the proposal for its own y*.

    Exactness: log_excess estimates log p(z* | y*) - log q(z* | y*); it is exact as ``num_proposals`` grows.
    """
    simulate = proposal.problem.simulate
    assert simulate is not None

    def one(key):
        for_pair, for_truth, for_draws = jax.random.split(key, 3)
        z, y = simulate(for_pair)
        context = proposal.context(y)
        truth = context.affine.inverse(z.astype(jnp.float32))
        if not proposal.problem.has_density:
            return flatten(proposal.features(y)), jnp.nan, -jnp.inf, truth
        log_w = weigh(for_truth, proposal, context, y, z).log_weight
        keys = jax.random.split(for_draws, num_proposals)
        log_ws = jax.vmap(lambda key: draw(key, proposal, context, y))(keys).log_weight
        log_ws = jnp.where(jnp.isnan(log_ws), -jnp.inf, log_ws)
        log_mean = jax.nn.logsumexp(log_ws) - jnp.log(num_proposals)
        return flatten(proposal.features(y)), log_w - log_mean, log_effective_share(log_ws), truth

    features, excess, share, truth = jax.lax.map(one, jax.random.split(key, num), batch_size=64)
    return ForwardBank(features, loneliness(features), excess, share, truth)


@eqx.filter_jit
def outlier_bank(proposal: Proposal, z: Float[Array, "num dim"], x: Sites) -> ForwardBank:
    """Keep given joint draws (z*, standardised x*), for outliers alone: nothing is weighed."""
    features = jax.vmap(flatten)(x)
    affine = jax.vmap(proposal.whitening)(x)
    truth = jax.vmap(lambda affine, z: affine.inverse(z))(affine, z.astype(jnp.float32))
    nothing = jnp.full(features.shape[0], jnp.nan)
    return ForwardBank(features, loneliness(features), nothing, jnp.full_like(nothing, -jnp.inf), truth)


def loneliness(features: Float[Array, "num features"]) -> Float[Array, " num"]:
    """Compute the distance of each simulation to its nearest fellows."""

    def lonely(i):
        return neighbour_distance(jnp.linalg.norm(features - features[i], axis=1).at[i].set(jnp.inf))

    return jax.lax.map(lonely, jnp.arange(features.shape[0]), batch_size=64)
