"""Refinement: train the score itself further on one observation, where an affine change of its draws is not enough."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.montecarlo.moves import LangevinMoves
from scoreinfer.montecarlo.reference import reference_draws, reference_of
from scoreinfer.montecarlo.tempering import advance, begin
from scoreinfer.nets.embedding import flatten
from scoreinfer.samplers.amortised import Context, Proposal
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.focused import AbstractAdapted, FocusedProposal
from scoreinfer.samplers.single import Pools, replace, teach
from scoreinfer.score.network import ConditionalScore

NUM_PARTICLES = 4096
NUM_MOVES = 20
WARM_UP = 5
"""Passes of moves before training: they part the duplicates and settle the step size."""


class RefinedContext(NamedTuple):
    """One observation, and whether it is the one the score was trained on."""

    here: Bool[Array, ""]
    context: Context


class RefinedProposal(AbstractAdapted):
    """A proposal whose score was trained further on one observation; at any other, the proposal it came from.

    Args:
        original: the amortised proposal.
        refined: what became of it.
        x: features of the observation.

    Exactness: as for `Proposal`.
    """

    original: Proposal
    refined: Proposal
    x: Float[Array, " features"]

    def context(self, y: Sites) -> RefinedContext:
        """Embed one observation."""
        # Not to the last bit: the same features may be rounded differently in another compiled program.
        here = jnp.allclose(flatten(self.features(y)), self.x, rtol=1e-5, atol=1e-5)
        return RefinedContext(here, self._at(here).context(y))

    def propose(self, key: Key, context: RefinedContext) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return self._at(context.here).propose(key, context.context)

    def log_q(self, key: Key, context: RefinedContext, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z."""
        return self._at(context.here).log_q(key, context.context, z)

    def _at(self, here: Bool[Array, ""]) -> Proposal:
        def choose(refined, original):
            return jnp.where(here, refined, original) if eqx.is_array(refined) else refined

        return jax.tree.map(choose, self.refined, self.original)


def refine(
    key: Key, proposal: FocusedProposal, y: Sites, num_steps: int, *, progress_bar: bool = False
) -> tuple[RefinedProposal, float]:
    """Train the adapted component of a focused proposal further, on weighted and moved draws of its own.

    Args:
        key: random key.
        proposal: the proposal, focused on ``y``.
        y: the observation.
        num_steps: optimiser steps.
        progress_bar: show progress bars on a terminal.

    Returns:
        The proposal with the score of the best round, and the effective share of its draws.

    Raises:
        FloatingPointError: where training fails from the start.

    Exactness: any outcome is a legitimate proposal; later draws use other keys, so their weights stay unbiased.
        What the focused proposal never draws the refined one will not learn: see `scoreinfer.evidence.witnesses`.
    """
    for_draws, for_rows, for_particles, for_moves, for_rounds = jax.random.split(key, 5)
    adapted, problem = proposal.adapted, proposal.problem
    drawn = weighted_draws(for_draws, proposal, y, 1024, None, 0, NUM_PARTICLES)
    reference, target = reference_of(problem, 1.0), jax.tree_util.Partial(problem.log_joint, y=y)
    moves = LangevinMoves(reference, target, NUM_MOVES)
    particles = begin(moves, reference_draws(for_particles, reference, NUM_PARTICLES), power=1.0)
    particles = replace(for_rows, particles, drawn)
    for for_pass in jax.random.split(for_moves, WARM_UP):
        particles = advance(for_pass, moves, particles)
    affine, x = _context(adapted, y)
    pools = Pools(moves, particles, affine, x)

    def make(module: ConditionalScore) -> Proposal:
        return dataclasses.replace(adapted, embedding=module.embedding, score=module.score)

    module = ConditionalScore(adapted.embedding, adapted.score)
    refined, share, _ = teach(for_rounds, module, make, pools, y, num_steps, progress_bar=progress_bar)
    return RefinedProposal(proposal.original, refined, flatten(x)), share


AmortisedProposal = Proposal | FocusedProposal | RefinedProposal
"""What the certificate of an amortised posterior can hold simulations against."""


@eqx.filter_jit
def _context(proposal: Proposal, y: Sites) -> tuple[Affine, Sites]:
    return proposal.context(y).affine, proposal.features(y)
