"""Integrals of scalar likelihoods against Gaussians, on grids that find where the mass is.

Gauss-Hermite nodes stand where the Gaussian has its mass. A likelihood can be a thousand times narrower, and lie
between two of them, or farther out than all of them. Here grids follow each other, each on what the last one has found
to matter: narrower where few nodes matter, and farther out where the last node does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Numbers = Float[Array, " points"]
LogLikelihood = Callable[[Numbers], Numbers]
"""The log likelihood of every point, given the number that it sees."""

NUM_NODES = 41
MAX_GRIDS = 24
WIDEST = 12.0
"""The first grid ends this many standard deviations from the mean."""
GROWTH = 4.0
"""A grid whose end matters is continued there by so many times its width."""
CUT = 18.0
"""A node matters where the log density lies this far below its maximum or less: exp(-18) is 2e-8."""
ENOUGH = 16
"""A grid is fine enough where what matters is as wide as so many of its steps: about as many as 12 standard deviations.
The next one, on what matters alone, is the last."""


class Tilted(NamedTuple):
    """A Gaussian times a likelihood, point by point.

    Args:
        log_evidence: log of its integral.
        mean: its mean.
        variance: its variance.
    """

    log_evidence: Numbers
    mean: Numbers
    variance: Numbers


def tilt(log_likelihood: LogLikelihood, mean: Numbers, variance: Numbers) -> Tilted:
    """Compute log Z = log int exp(l(u)) N(u; mean, variance) du, and mean and variance of the integrand.

    Where the likelihood is zero on the whole first grid, log Z is -inf, and mean and variance stay.

    Exactness: consistent as the grids become finer; to about 1e-6 where the integrand has one mode, at any distance, or
        two that are at least 1/300 of a standard deviation wide. Of several modes, those narrower than a step of the
        first grid, .6 standard deviations, may be lost.

    >>> tilted = tilt(lambda u: -0.5 * (u - 2.0) ** 2, jnp.zeros(1), jnp.ones(1))
    >>> float(tilted.mean[0].round(6)), float(tilted.variance[0].round(6))
    (1.0, 0.5)
    """
    low, high = _window(log_likelihood, mean, variance)
    width, share = high - low, _shares(mean.dtype)
    log_density = _log_density(log_likelihood, mean, variance, low + width * share)
    top = jnp.max(log_density, axis=0)
    some = jnp.isfinite(top)
    top = jnp.where(some, top, 0.0)
    weight = jnp.exp(log_density - top)
    total = weight.sum(0)
    weight = weight / jnp.where(some, total, 1.0)
    centre = (weight * share).sum(0)
    spread = jnp.maximum((weight * (share - centre) ** 2).sum(0), (0.25 * share[1]) ** 2)  # what a grid can tell
    log_evidence = top + jnp.log(total * width * share[1])
    found = low + width * centre, jnp.maximum(width**2 * spread, jnp.finfo(mean.dtype).tiny)
    return Tilted(log_evidence, jnp.where(some, found[0], mean), jnp.where(some, found[1], variance))


def _shares(dtype) -> Float[Array, "nodes 1"]:
    """Make the nodes, as shares of the way from one end to the other."""
    return jnp.linspace(0.0, 1.0, NUM_NODES, dtype=dtype)[:, None]


def _log_density(log_likelihood, mean, variance, u):
    """Evaluate the log of the integrand; a law that fails far out has no mass there."""
    log_normal = -0.5 * ((u - mean) ** 2 / variance + jnp.log(2.0 * jnp.pi * variance))
    log_density = jax.vmap(log_likelihood)(u) + log_normal
    return jnp.where(jnp.isfinite(log_density), log_density, -jnp.inf)


def _window(log_likelihood, mean, variance) -> tuple[Numbers, Numbers]:
    """Find the ends of what matters. To first order the integrals do not depend on them: they have no derivative."""

    def narrow(state):
        num, low, high, done = state
        new_low, new_high, new_done = _narrowed(log_likelihood, mean, variance, low, high)
        state = jnp.where(done, low, new_low), jnp.where(done, high, new_high), done | new_done
        return num + 1, *jax.lax.stop_gradient(state)

    reach = WIDEST * jnp.sqrt(variance)
    start = jax.lax.stop_gradient((0, mean - reach, mean + reach, jnp.zeros(mean.shape, bool)))
    _, low, high, _ = jax.lax.while_loop(lambda state: (state[0] < MAX_GRIDS) & ~state[3].all(), narrow, start)
    return low, high


def _narrowed(log_likelihood, mean, variance, low, high) -> tuple[Numbers, Numbers, Bool[Array, " points"]]:
    """Find the interval of the nodes that matter, and a step beyond them on either side; and whether it is the last."""
    width = high - low
    step = width / (NUM_NODES - 1)
    log_density = _log_density(log_likelihood, mean, variance, low + width * _shares(mean.dtype))
    top = jnp.max(log_density, axis=0)
    matters = log_density > top - CUT
    first, last = jnp.argmax(matters, axis=0), NUM_NODES - 1 - jnp.argmax(matters[::-1], axis=0)
    new_low = jnp.where(matters[0], low - GROWTH * width, low + (first - 1) * step)
    new_high = jnp.where(matters[-1], high + GROWTH * width, low + (last + 1) * step)
    nothing = ~jnp.isfinite(top)
    done = ~matters[0] & ~matters[-1] & (last - first >= ENOUGH)
    return jnp.where(nothing, low, new_low), jnp.where(nothing, high, new_high), nothing | done
