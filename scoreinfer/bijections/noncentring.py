"""Scales: a map that undoes what some coordinates do to the scale and the place of others.

In a hierarchical model the spread of one parameter is another parameter: groups' effects are narrow where their
standard deviation is small and wide where it is large (a funnel). Divided by the spread that the other parameters give
them, and counted from the mean that these give them, they have the same spread everywhere: a partially non-centred
parametrisation, found from draws.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scoreinfer.bijections.base import fisher_product, pull, spread

MAX_GIVERS = 8
"""How many coordinates may scale and move the others."""
EXPLAINED = 0.2
"""Share of the variance of a log squared deviation that another coordinate must explain to be one of them."""
FARTHEST = 5.0
"""Givers count as no farther from their median than so many standard deviations."""
GAIN = 0.5
"""Share of the Fisher information that scaling must take away, summed over the coordinates."""
NUM_SWEEPS = 5


class Scales(eqx.Module):
    """The map w -> z = mean + w exp(log scale), mean and log scale linear in the coordinates that are ``givers``.

    Givers have no mean and log scale but zero, so that z and w agree in them.
    """

    givers: Int[Array, " givers"]
    centre: Float[Array, " givers"]
    width: Float[Array, " givers"]
    mean: Float[Array, "givers+1 dim"]
    log_scale: Float[Array, "givers+1 dim"]

    def forward(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z from w."""
        given = self._given(w)
        return given @ self.mean + w * jnp.exp(given @ self.log_scale)

    def inverse(self, z: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute w from z."""
        given = self._given(z)
        return (z - given @ self.mean) * jnp.exp(-given @ self.log_scale)

    def log_det(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num"]:
        """Compute the logarithm of the Jacobian determinant."""
        return (self._given(w) @ self.log_scale).sum(-1)

    def _given(self, z):
        return design(z[..., self.givers], self.centre, self.width)


def design(
    values: Float[Array, "*num givers"], centre: Float[Array, " givers"], width: Float[Array, " givers"]
) -> Float[Array, "*num givers+1"]:
    """Standardise the givers, and put a one in front of them."""
    unit = jnp.clip((values - centre) / width, -FARTHEST, FARTHEST)
    return jnp.concatenate([jnp.ones_like(unit[..., :1]), unit], axis=-1)


def fit_scales(values: Float[Array, "num dim"], gradient: Float[Array, "num dim"]) -> Scales:
    """Find the coordinates that scale others, and regress means and log scales of these on them.

    A coordinate is scaled by those that explain the size of its residual, regressed on all before it (parents come
    before children). Nothing is where that would not take away half of the Fisher information, as among separate modes.

    Args:
        values: draws.
        gradient: gradient of their log density.

    References: Papaspiliopoulos, Roberts and Skold 2007, Statistical Science 22(1) (non-centring); Gorinova, Moore and
    Hoffman 2020, arXiv 1906.03028 (how much of it).
    """
    low, centre, high = jnp.quantile(values, jnp.array([0.25, 0.5, 0.75], values.dtype), axis=0)
    width = (high - low) / 1.349 + 1e-30
    givers, useful, scaled = _find((values - centre) / width)
    given = design(values[:, givers], centre[givers], width[givers])
    given = given * jnp.concatenate([jnp.ones(1, bool), useful])
    ones, zeros = jnp.ones_like(values), jnp.zeros((given.shape[1], values.shape[1]), values.dtype)

    def sweep(_, found):
        log_scale = _regress(given, log_square(values - given @ found[0]), ones)
        return _regress(given, values, jnp.exp(-2 * given @ log_scale)), log_scale

    mean, log_scale = jax.lax.fori_loop(0, NUM_SWEEPS, sweep, (zeros.at[0].set(centre), zeros))
    nothing = Scales(givers, centre[givers], width[givers], zeros, zeros)
    scales = dataclasses.replace(nothing, mean=mean * scaled, log_scale=log_scale * scaled)
    w = scales.inverse(values)
    before, after = (fisher_product(v, g).sum() for v, g in ((values, gradient), (w, pull(scales, w, gradient))))
    return jax.tree.map(lambda a, b: jnp.where(after < GAIN * before, a, b), scales, nothing)


def _find(unit: Float[Array, "num dim"]) -> tuple[Int[Array, " givers"], Bool[Array, " givers"], Bool[Array, " dim"]]:
    """Find the coordinates that scale or move others, the most useful first; which are of use; and the others."""
    residual = jax.scipy.linalg.solve_triangular(spread(unit, 1e-6), unit.T, lower=True).T
    unit = jnp.clip(unit, -FARTHEST, FARTHEST)
    explained = _explained(unit, log_square(residual))
    gives = (explained > EXPLAINED).any(1)
    scaled = (explained > EXPLAINED).any(0) & ~gives
    usefulness = jnp.where(scaled, explained + _explained(unit, unit), 0.0).max(1) * ~scaled
    most, givers = jax.lax.top_k(usefulness, min(MAX_GIVERS, unit.shape[1]))
    return givers, most > 0, scaled


def log_square(deviation: Float[Array, "num dim"]) -> Float[Array, "num dim"]:
    """Compute half the logarithm of squared deviations, which for normal ones has the log scale as its mean."""
    return 0.5 * (jnp.log(deviation**2 + 1e-30) + 1.27)


def _explained(a: Float[Array, "num dim"], b: Float[Array, "num dim"]) -> Float[Array, "dim dim"]:
    """Compute the squared correlation of each column of ``a`` with each other one of ``b``."""
    a, b = ((c - c.mean(0)) / (c.std(0) + 1e-30) for c in (a, b))
    return (a.T @ b / a.shape[0]) ** 2 * (1 - jnp.eye(a.shape[1], dtype=a.dtype))


def _regress(
    given: Float[Array, "num givers"], targets: Float[Array, "num dim"], precision: Float[Array, "num dim"]
) -> Float[Array, "givers dim"]:
    """Regress each column of targets by least squares, weighted by its own precisions."""

    def solve(target, precision):
        weighted = given.T * (precision / precision.mean())
        gram = weighted @ given / len(target)
        return jnp.linalg.solve(gram + 1e-6 * jnp.eye(len(gram), dtype=gram.dtype), weighted @ target / len(target))

    return jax.vmap(solve, in_axes=1, out_axes=1)(targets, precision)
