"""Focus: adapt a proposal to one observation by an affine map of its draws, and mix it with the original.

The method is adaptive importance sampling. Each round draws and tempers the weights by a power beta that keeps the
effective sample size above a bound. It then matches mean and covariance of the tempered draws. Rounds end when the
effective sample size is above half of the draws. The learned shape stays; only location and scale change. A quarter of
the draws still come from the original proposal, so the mixture covers everything that the original covers.

References: Cappe, Guillin, Marin and Robert 2004, "Population Monte Carlo"; Ryu and Boyd 2014, arXiv 1412.4845.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine
from scoreinfer.montecarlo.resampling import next_power
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.samplers.amortised import AbstractAmortised, AmortisedProposal, Context
from scoreinfer.samplers.base import Target
from scoreinfer.samplers.batches import draw_rows

SHARE = 0.75
"""Share of the draws that come from the adapted component. Chosen by judgement."""
NUM_DRAWS = 1024
"""Draws per round of adaptation. Chosen by judgement."""


class FocusedContext(NamedTuple):
    """What each of the two components computes from one observation."""

    original: Context
    adapted: Context


class AbstractAdapted(AbstractAmortised):
    """A proposal that was adapted to one observation from an amortised one, the ``original``."""

    original: eqx.AbstractVar[AmortisedProposal]

    @property
    def amortised(self):
        """Return the original, unadapted proposal."""
        return self.original


class FocusedProposal(AbstractAdapted):
    """A mixture of a proposal and the same proposal with another ``adjustment``.

    Exactness: ``log_q`` is the log density of the mixture, exact in the same sense as the original's. With path
        weights, a draw z has one path of each component: u of the original, with density q(z, u) and noising r(u | z),
        and v of the adapted one, with density a(z, v) and noising s(v | z). The weight is the ratio of

            target   pi(z) r(u | z) s(v | z),
            mixture  (1 - share) q(z, u) s(v | z) + share a(z, v) r(u | z).

        Both paths must therefore be independent given z, in `log_q` and in `propose`. For the flow, every step is
        inverted numerically. If no inverse is found, that component has density zero.
    """

    original: AmortisedProposal
    adapted: AmortisedProposal

    def context(self, target: Target) -> FocusedContext:
        """Compute what both components need of one observation."""
        return FocusedContext(self.original.context(target), self.adapted.context(target))

    def propose(self, key: Key, context: FocusedContext) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z from either component and compute the mixture's ``log_q``."""
        for_choice, for_draw, for_other = jax.random.split(key, 3)
        adapted = jax.random.uniform(for_choice) < SHARE
        # The components differ only in their contexts.
        chosen, other = (
            jax.tree.map(lambda a, b: jnp.where(adapted, a, b), *pair)
            for pair in ((context.adapted, context.original), (context.original, context.adapted))
        )
        z, log_q = self.original.propose(for_draw, chosen)
        log_other = self.original.log_q(for_other, other, z)
        return z, jnp.where(adapted, _mix(log_other, log_q), _mix(log_q, log_other))

    def log_q(self, key: Key, context: FocusedContext, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the mixture's ``log_q`` of a given z. Path weights use one new path of each component."""
        for_original, for_adapted = jax.random.split(key)
        log_original = self.original.log_q(for_original, context.original, z)
        return _mix(log_original, self.original.log_q(for_adapted, context.adapted, z))


def _mix(log_original, log_adapted):
    return jnp.logaddexp(jnp.log(1.0 - SHARE) + log_original, jnp.log(SHARE) + log_adapted)


def _moments(z: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = weight @ z
    centred = z - mean
    return mean, (centred * weight[:, None]).T @ centred


def focus(
    key: Key, original: AmortisedProposal, target: Target, *, max_rounds: int = 12
) -> tuple[FocusedProposal, float]:
    """Adapt a proposal to one observation.

    Args:
        key: random key.
        original: the amortised proposal.
        target: the posterior of the observation.
        max_rounds: largest number of rounds.

    Returns:
        The mixture of the original and the best round's adapted proposal, and the effective sample size of the adapted
        proposal divided by the number of its draws.

    Exactness: every result is a valid proposal. Later draws use other keys, so their weights are unbiased.
    """
    dim, num = target.problem.dim, NUM_DRAWS
    stretch, shift = np.eye(dim), np.zeros(dim)
    best, best_ess = original, -1.0
    for round_key in jax.random.split(key, max_rounds):
        adjustment = Affine(jnp.asarray(shift, jnp.float32), jnp.asarray(stretch, jnp.float32))
        current = dataclasses.replace(original, adjustment=adjustment)
        drawn = draw_rows(round_key, current, target, jnp.arange(num))
        z, log_weight = (np.asarray(leaf, np.float64) for leaf in (drawn.z, drawn.log_weight))
        log_weight = np.where(np.isfinite(log_weight), log_weight, -np.inf)
        ess = effective_sample_size(log_weight)
        if ess > best_ess:
            best, best_ess = current, ess
        if ess > 0.5 * num or not np.isfinite(log_weight.max()):
            break
        power = float(next_power(log_weight - log_weight.max(), max(0.1, min(5.0 * dim / num, 0.5))))
        weight = np.exp(power * (log_weight - log_weight.max()))
        weight /= weight.sum()
        (mean, covariance), (old_mean, old) = _moments(z, weight), _moments(z, np.full(num, 1 / num))
        trust = 1.0 / (1.0 + dim / effective_sample_size(power * log_weight))
        covariance = trust * covariance + (1.0 - trust) * old + 1e-10 * np.diag(np.diag(old))
        move = np.linalg.cholesky(covariance) @ np.linalg.inv(np.linalg.cholesky(old + 1e-10 * np.diag(np.diag(old))))
        stretch, shift = move @ stretch, mean + move @ (shift - old_mean)
    return FocusedProposal(original, best), max(best_ess, 0.0) / num
