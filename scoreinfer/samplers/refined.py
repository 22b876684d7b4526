"""Refinement: train the score further on one observation, if an affine map of its draws is not enough."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scoreinfer._keys import keys_of
from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.montecarlo.population import first_population
from scoreinfer.montecarlo.reference import reference_draws, reference_of
from scoreinfer.montecarlo.tempering import begin
from scoreinfer.nets.embedding import flatten
from scoreinfer.samplers.amortised import AmortisedProposal, Context
from scoreinfer.samplers.base import Target
from scoreinfer.samplers.batches import BATCH, weighted_draws
from scoreinfer.samplers.explorer import Effort, moves_between
from scoreinfer.samplers.focused import AbstractAdapted, FocusedProposal
from scoreinfer.samplers.single import Pools, judge, replace, teach
from scoreinfer.score.network import ConditionalScore

EFFORT = Effort(num_particles=4096)
"""Particles that the score is trained on, and their moves. Chosen by judgement."""
WARM_UP = 5
"""Passes before training; they separate duplicates and adapt the step size. Chosen by judgement."""


class RefinedContext(NamedTuple):
    """What the proposal computes from one observation.

    Args:
        here: whether the score was trained on this observation.
        context: context of the refined proposal or, for another observation, of the original.
    """

    here: Bool[Array, ""]
    context: Context


class RefinedProposal(AbstractAdapted):
    """A proposal whose score was trained further on one observation. At any other observation it is the original.

    Args:
        original: the amortised proposal.
        refined: the proposal after the further training.
        x: flat standardised features of the observation.

    Exactness: as for `AmortisedProposal`.
    """

    original: AmortisedProposal
    refined: AmortisedProposal
    x: Float[Array, " features"]

    def context(self, target: Target) -> RefinedContext:
        """Compute everything that the proposal needs of one observation."""
        # With a tolerance: another compiled program may round the same features differently.
        here = jnp.allclose(flatten(self.features(target)), self.x, rtol=1e-5, atol=1e-5)
        return RefinedContext(here, self._at(here).context(target))

    def propose(self, key: Key, context: RefinedContext) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return self._at(context.here).propose(key, context.context)

    def log_q(self, key: Key, context: RefinedContext, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z."""
        return self._at(context.here).log_q(key, context.context, z)

    def _at(self, here: Bool[Array, ""]) -> AmortisedProposal:
        def choose(refined, original):
            return jnp.where(here, refined, original) if eqx.is_array(refined) else refined

        return jax.tree.map(choose, self.refined, self.original)


def refine(
    key: Key, proposal: FocusedProposal, target: Target, num_steps: int, *, progress_bar: bool = False
) -> tuple[RefinedProposal, float]:
    """Train the adapted component of a focused proposal further, on the proposal's own weighted and moved draws.

    Args:
        key: random key.
        proposal: the proposal, focused on the observation.
        target: the posterior of the observation.
        num_steps: optimiser steps.
        progress_bar: whether to show progress bars on a terminal.

    Returns:
        The proposal with the score of the best round, and the effective sample size of its draws divided by their
        number.

    Raises:
        FloatingPointError: if a round of training ends before any epoch has a finite loss.

    Exactness: every result is a valid proposal. Later draws use other keys, so their weights are unbiased. A mode that
        the focused proposal never draws is not learned (see `scoreinfer.evidence.witnesses`).
    """
    for_draws, for_rows, for_particles, for_moves, for_rounds, *_ = keys_of(key)
    adapted = proposal.adapted
    drawn = weighted_draws(for_draws, proposal, target, BATCH, None, 0, EFFORT.num_particles)
    reference = reference_of(target.problem, 1.0)
    moves = moves_between(reference, target, EFFORT)
    anywhere = reference_draws(for_particles, reference, EFFORT.num_particles)
    particles = begin(moves, first_population(anywhere, len(anywhere)), np.array(1.0))
    affine, x = _context(adapted, target)
    pools = replace(for_rows, Pools(moves, target, particles, affine, x), drawn)
    for for_pass in keys_of(for_moves)[:WARM_UP]:
        pools = pools.moved(for_pass)

    def make(module: ConditionalScore) -> AmortisedProposal:
        return dataclasses.replace(adapted, embedding=module.embedding, score=module.score)

    module = ConditionalScore(adapted.embedding, adapted.score)
    for_first, for_rounds, *_ = keys_of(for_rounds)
    first, _ = judge(for_first, make(module), target, pools.particles.values, 0)
    best = teach(for_rounds, module, make, pools, first, num_steps, progress_bar=progress_bar).best
    return RefinedProposal(proposal.original, best.proposal, flatten(x)), best.share


@eqx.filter_jit
def _context(proposal: AmortisedProposal, target: Target) -> tuple[Affine, Sites]:
    return proposal.context(target).affine, proposal.features(target)
