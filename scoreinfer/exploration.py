"""Exploration: forward evidence at one observation itself, where that of its neighbours is not enough.

The truths of the simulations nearest to y are carried over to y by the whitening maps, and each starts a chain of
Langevin steps on the posterior. Where a chain ends, its weight is compared with those of the proposal's own draws: a
mode that the proposal misses shows as a huge one.
"""

from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.certificate import ForwardCheck
from scoreinfer.correct import move_all
from scoreinfer.drawing import batch_shape, draw_rows, weigh_rows
from scoreinfer.forward import ForwardBank
from scoreinfer.nets.embedding import flatten
from scoreinfer.proposal import Weighted
from scoreinfer.refinement import AmortisedProposal

NUM_DRAWS = 1024
"""The proposal's own draws, that those where chains end are compared with."""


class ExploredBank(NamedTuple):
    """Forward evidence for one observation; for any other, that of the simulations near it.

    Args:
        original: simulations held against the amortised proposal.
        x: features of the observation that was explored.
        log_excess: log(w / mean proposal weight) where chains started from simulated truths have ended.
    """

    original: ForwardBank
    x: Float[Array, " features"]
    log_excess: Float[Array, " neighbours"]

    @eqx.filter_jit
    def check(self, x: Float[Array, " features"]) -> ForwardCheck:
        """Look up the evidence near the observation with features ``x``."""
        check, same = self.original.check(x), jnp.allclose(x, self.x, rtol=1e-5, atol=1e-5)
        return check._replace(log_excess=jnp.where(same, self.log_excess, check.log_excess))


def explore(
    key: Key,
    proposal: AmortisedProposal,
    bank: ForwardBank | ExploredBank,
    y: Sites,
    *,
    num_moves: int = 200,
) -> ExploredBank:
    """Look, from simulated truths, for places that the proposal would never draw at the observation ``y``.

    Only chains that end at a log density within the range of the proposal's own weighted draws count.

    Exactness: evidence, not proof: chains find what simulated truths lead to.
    """
    bank = bank.original if isinstance(bank, ExploredBank) else bank
    for_draws, for_moves, for_weights = jax.random.split(key, 3)
    drawn = draw_rows(for_draws, proposal, y, jnp.arange(NUM_DRAWS))
    starts, factor, x = _starts(proposal, bank, y)
    density = jax.tree_util.Partial(proposal.problem.log_joint, y=y)
    ends, *_ = move_all(for_moves, density, starts.astype(drawn.values.dtype), factor, num_moves)
    num = ends.shape[0]
    ended = in_batches(lambda i: weigh_rows(for_weights, proposal, y, i, ends[i]), num, batch_shape(num, NUM_DRAWS))
    log_excess, high = hold_against(drawn, ended)
    return ExploredBank(bank, x, jnp.where(high, log_excess, -jnp.inf))


@eqx.filter_jit
def _starts(proposal: AmortisedProposal, bank: ForwardBank, y: Sites):
    x, context = flatten(proposal.features(y)), cast(Any, proposal.context(y))
    affine, factor = proposal.carry(context)
    near, _ = bank.nearest(x)
    return jax.vmap(affine.forward)(bank.truth[near]), factor, x


@eqx.filter_jit
def hold_against(drawn: Weighted, places: Weighted) -> tuple[Float[Array, " places"], Bool[Array, " places"]]:
    """Compare weights at some places with the mean weight of a proposal's own draws.

    Returns:
        The log ratios, and whether each place's log density is within the range of 99 % of the draws' weight.
    """
    log_weight = jnp.where(jnp.isnan(drawn.log_weight), -jnp.inf, drawn.log_weight)
    order = jnp.argsort(drawn.log_joint)
    below = jnp.cumsum(jax.nn.softmax(log_weight)[order])
    floor = drawn.log_joint[order][jnp.searchsorted(below, 0.01)]
    log_mean = jax.nn.logsumexp(log_weight) - jnp.log(drawn.num)
    return places.log_weight - log_mean, places.log_joint >= floor
