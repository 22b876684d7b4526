"""Focus: adapt a proposal to one observation by moving and stretching its draws, and mix it with the original.

Adaptive importance sampling: draw, weigh with a power beta of the weights that keeps the effective sample size up,
match mean and covariance, and again, until beta is 1. The learned shape stays; only its place and scale change. A
quarter of the draws still come from the original proposal, so what that one covers stays covered.

References: Cappe, Guillin, Marin and Robert 2004, "Population Monte Carlo"; Ryu and Boyd 2014, arXiv 1412.4845.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.montecarlo.resampling import next_power
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import Context, Proposal
from scoreinfer.samplers.batches import draw_rows
from scoreinfer.samplers.diffusion import AbstractSampler

SHARE = 0.75
"""Share of the draws that come from the adapted component."""
NUM_DRAWS = 1024
"""Draws per round of adaptation."""


class FocusedContext(NamedTuple):
    """One observation as the two components see it."""

    original: Context
    adapted: Context


class AbstractAdapted(eqx.Module):
    """What proposals adapted to one observation have of the one they come from."""

    original: eqx.AbstractVar[Proposal]

    @property
    def problem(self) -> Problem:
        """The problem the proposal is for."""
        return self.original.problem

    @property
    def sampler(self) -> AbstractSampler:
        """The sampler."""
        return self.original.sampler

    def features(self, y: Sites) -> Sites:
        """Compute the standardised observation."""
        return self.original.features(y)


class FocusedProposal(AbstractAdapted):
    """A mixture of a proposal and of the same proposal with another ``adjustment``.

    Exactness: ``log_q`` is that of the mixture, exact in the same sense as the original's. Where components are weighed
        over paths u and v, with densities q(z, u) and a(z, v) and noisings r(u | z) and s(v | z), a draw comes with a
        path of each: the mixture draws (z, u, v) with density (1 - share) q(z, u) s(v | z) + share a(z, v) r(u | z),
        the target there is pi(z) r(u | z) s(v | z), and their ratio is the weight. So both paths must be independent
        given z, in `log_q` as in `propose`. For the flow it rests on finding each step's inverse numerically; where
        none is found, that component counts as density zero.
    """

    original: Proposal
    adapted: Proposal

    def context(self, y: Sites) -> FocusedContext:
        """Embed one observation for both components."""
        return FocusedContext(self.original.context(y), self.adapted.context(y))

    def propose(self, key: Key, context: FocusedContext) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z from either component and compute the mixture's ``log_q``."""
        for_choice, for_draw, for_other = jax.random.split(key, 3)
        adapted = jax.random.uniform(for_choice) < SHARE
        # The components differ in their contexts alone.
        chosen, other = (
            jax.tree.map(lambda a, b: jnp.where(adapted, a, b), *pair)
            for pair in ((context.adapted, context.original), (context.original, context.adapted))
        )
        z, log_q = self.original.propose(for_draw, chosen)
        log_other = self.original.log_q(for_other, other, z)
        return z, jnp.where(adapted, _mix(log_other, log_q), _mix(log_q, log_other))

    def log_q(self, key: Key, context: FocusedContext, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the mixture's ``log_q`` of a given z, over a path of either component drawn anew."""
        for_original, for_adapted = jax.random.split(key)
        log_original = self.original.log_q(for_original, context.original, z)
        return _mix(log_original, self.original.log_q(for_adapted, context.adapted, z))


def _mix(log_original, log_adapted):
    return jnp.logaddexp(jnp.log(1.0 - SHARE) + log_original, jnp.log(SHARE) + log_adapted)


def _moments(z: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = weight @ z
    centred = z - mean
    return mean, (centred * weight[:, None]).T @ centred


def focus(key: Key, original: Proposal, y: Sites, *, max_rounds: int = 12) -> tuple[FocusedProposal, float]:
    """Adapt a proposal to the observation ``y``.

    Args:
        key: random key.
        original: the amortised proposal.
        y: the observation.
        max_rounds: rounds of drawing and matching at the most.

    Returns:
        The mixture of the best round's adapted proposal and the original, and the adapted one's effective share.

    Exactness: any outcome is a legitimate proposal; later draws use other keys, so their weights stay unbiased.
    """
    dim, num = original.problem.dim, NUM_DRAWS
    stretch, shift = np.eye(dim), np.zeros(dim)
    best, best_ess = original, -1.0
    for round_key in jax.random.split(key, max_rounds):
        adjustment = Affine(jnp.asarray(shift, jnp.float32), jnp.asarray(stretch, jnp.float32))
        current = dataclasses.replace(original, adjustment=adjustment)
        drawn = draw_rows(round_key, current, y, jnp.arange(num))
        z, log_weight = (np.asarray(leaf, np.float64) for leaf in (drawn.values, drawn.log_weight))
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
