"""A bridge between posteriors that are too far apart for weights: particles walk from one to the other by tempering.

Equally weighted draws of the old posterior p become particles. They pass through the densities

    p(z, y)^(1 - b) p'(z, y')^b,        b from 0 to 1,

by weighing, resampling and moving (`scoreinfer.montecarlo.tempering`). A kernel estimate is then fitted to them. It is
the proposal of the draws that are returned: they have exact weights and a certificate, however well the particles did.

References: Del Moral, Doucet and Jasra 2006, JRSS B 68(3) (tempering between two densities); West 1993, JRSS B 55(2).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.evidence.certificate import certify_weights
from scoreinfer.evidence.witnesses import Judged, gather, judge
from scoreinfer.montecarlo.kernel_estimate import kernel_estimate
from scoreinfer.montecarlo.moves import DifferenceMoves
from scoreinfer.montecarlo.population import first_population
from scoreinfer.montecarlo.reference import AbstractReference, reference_of
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.tempering import begin, walk
from scoreinfer.problem import Problem
from scoreinfer.reweighing.reweigh import Change, read_change
from scoreinfer.samplers.base import Target, Weighted
from scoreinfer.samplers.batches import Defence, constrain, weighted_draws
from scoreinfer.samplers.tuned import FittedMixture

NUM_PARTICLES, BATCH = 2048, 1024
"""Particles, and draws for each compiled call. Chosen by judgement."""


class OldPosterior(AbstractReference):
    """The old posterior as a start: its unnormalised density, and equally weighted draws in place of a sampler.

    Exactness: `sample` is consistent as the number of draws grows.
    """

    target: Target
    draws: Float[Array, "num dim"]

    def sample(self, key):
        """Take one of the draws."""
        return self.draws[jax.random.randint(key, (), 0, len(self.draws))]

    def log_density(self, z):
        """Compute log p(z, y)."""
        return self.target(z)


@own_broadcasting
def bridge(key: Key, draws: Draws, model: Callable[..., Any] | Problem, *args: Any, **kwargs: Any) -> Draws:
    """Draw from the posterior of a changed model, starting from draws of another: by tempering.

    For changes that are too large for `reweigh`. No network is trained.

    Args:
        key: random key.
        draws: weighted draws of the old model.
        model: the changed model, with the same latent sites.
        *args: its arguments, with the data.
        **kwargs: its keyword arguments.

    Returns:
        As many new weighted draws, with a certificate.

    Raises:
        ValueError: if the draws hold no problem or no weights, no weight is positive, the latent sites differ, or the
            data do not fit.
        FloatingPointError: if the particles do not reach the new posterior.
        UnsupportedModel: if the model cannot be read.

    Exactness: exact importance weights of draws from a density fitted to the particles, whatever they have found. A
        mode that no draw visits is seen as by every proposal (see `scoreinfer.evidence.witnesses`).
    """
    for_rows, for_walk, for_draws, for_others, for_witnesses, for_weights = jax.random.split(key, 6)
    change = read_change(draws, model, args, kwargs)
    particles = _crossed(for_rows, for_walk, change)
    proposal, target = FittedMixture(kernel_estimate(particles)), change.new

    def propose(key: Key, defence: Defence | None) -> Weighted:
        return weighted_draws(key, proposal, target, BATCH, defence, 0, draws.num)

    drawn, problem = propose(for_draws, None), target.problem
    if problem.simulate is None:
        judged = Judged(drawn, certify_weights(drawn.log_weight), drawn.num)
    else:
        witnesses = gather(for_witnesses, reference_of(problem), target)
        judged = judge(
            for_weights, proposal, target, drawn, witnesses, None, lambda defence: propose(for_others, defence)
        )
    drawn = judged.drawn
    return Draws(
        constrain(problem, drawn.z, target.y), drawn.z, drawn.log_weight, drawn.log_q, drawn.log_target, target.y,
        judged.certificate, DrawInfo(judged.num_proposals, 0, witnessed=judged.witnessed), problem,
    )  # fmt: skip


def _crossed(for_rows: Key, for_walk: Key, change: Change) -> Float[np.ndarray, "num dim"]:
    """Walk particles from the old posterior to the new one."""
    before = change.before
    values = before.z[resample_indices(for_rows, before.log_weight, NUM_PARTICLES)]
    num_moves = np.array(20 + 2 * values.shape[1])
    moves = DifferenceMoves(OldPosterior(change.old, values), change.new, num_moves)
    particles = walk(for_walk, moves, begin(moves, first_population(values, NUM_PARTICLES), jnp.zeros(())))
    if float(particles.power) < 1.0:
        raise FloatingPointError(
            f"The particles must reach power 1 of the changed posterior, but reached only {float(particles.power):.2g}."
            " It is too far from the old one, or zero at all of its draws. Fit the changed model by itself."
        )
    return np.asarray(particles.values)
