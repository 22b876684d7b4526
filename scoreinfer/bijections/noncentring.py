"""Non-centring: the map z = mean + w exp(log_scale), where mean and log_scale depend on other coordinates, the parents.

In a hierarchical model one parameter can be the scale of others. The effects of groups, for instance, are narrow where
their standard deviation is small, and wide where it is large: a funnel. The non-centred effects w = (z - mean) / scale
are equally wide everywhere. Here mean and log scale are regressed on the parents, from draws of the posterior.

References: Papaspiliopoulos, Roberts and Skold 2007, Statistical Science 22(1) (non-centring); Gorinova, Moore and
Hoffman 2020, arXiv 1906.03028 (non-centring in part, learned).
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scoreinfer.bijections.base import fisher_product, pull, spread

MAX_PARENTS = 8
"""Largest number of parents. Chosen by judgement: models have few parameters that scale others, and the regressions
then solve systems of at most 9 equations."""
EXPLAINED = 0.2
"""A parent must explain at least this share of the variance of a log squared deviation.

Measured with 4096 draws or more: parents explain 0.64 in Neal's funnels, and 0.39 to 0.45 in a hierarchy of four
groups. In mixtures of 9 or 40 modes the largest share is 0.18. Two modes far apart reach 0.89: `GAIN` refuses that map.
"""
SCALED = 0.03
"""A parent scales every coordinate whose log squared deviation it explains to this share of the variance. Informative
data hide the scale: in centred eight schools the parent explains 0.04 to 0.30 of the eight effects, and the map leaves
a summed `fisher_product` of 13 if all effects are scaled, of 19,000 if only the five above `EXPLAINED` are.
"""
FARTHEST = 5.0
"""Parents are clipped at this many standard deviations from their median. Chosen by judgement: normal draws do not come
so far, and farther out a fitted exponential would be extrapolation."""
GAIN = 0.5
"""The map is kept only if it leaves at most this share of the sum of `fisher_product`.

Measured: funnels leave 0.0002, mixtures with separate modes 1 or more.
"""
NUM_SWEEPS = 5
"""How often means and log scales are regressed in turn. Measured on a hierarchy of four groups: one sweep leaves a
summed `fisher_product` of 56, two leave 5.91, ten 5.92. Five are a margin."""
QUARTILES = 1.349
"""Interquartile range of the standard normal distribution, in standard deviations."""
MEAN_LOG_SQUARE = -1.27
"""E[log e^2] for e ~ N(0, 1), minus the Euler constant minus log 2."""


class Scales(eqx.Module):
    """The map w -> z = mean + w exp(log_scale), where both are affine functions of the standardised parents.

    Parents are the same in z and w: their own columns of ``mean`` and ``log_scale`` must be zero.

    Args:
        parents: indices of the parents.
        centre: of the parents, for standardising.
        width: of the parents, for standardising.
        mean: coefficients of the mean: the constant, then one row for each parent.
        log_scale: coefficients of the log scale, in the same order.
    """

    parents: Int[Array, " parents"]
    centre: Float[Array, " parents"]
    width: Float[Array, " parents"]
    mean: Float[Array, "parents+1 dim"]
    log_scale: Float[Array, "parents+1 dim"]

    def forward(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z from w."""
        rows = self._design(w)
        return rows @ self.mean + w * jnp.exp(rows @ self.log_scale)

    def inverse(self, z: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute w = (z - mean) exp(-log_scale) from z."""
        rows = self._design(z)
        return (z - rows @ self.mean) * jnp.exp(-rows @ self.log_scale)

    def log_det(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num"]:
        """Compute the sum of the log scales."""
        return (self._design(w) @ self.log_scale).sum(-1)

    def _design(self, z):
        return design(z[..., self.parents], self.centre, self.width)


def design(
    values: Float[Array, "*num parents"], centre: Float[Array, " parents"], width: Float[Array, " parents"]
) -> Float[Array, "*num parents+1"]:
    """Make the rows of the regressions' design matrix: a one, then the standardised parents, clipped at `FARTHEST`."""
    unit = jnp.clip((values - centre) / width, -FARTHEST, FARTHEST)
    return jnp.concatenate([jnp.ones_like(unit[..., :1]), unit], axis=-1)


def fit_scales(values: Float[Array, "num dim"], gradient: Float[Array, "num dim"]) -> Scales:
    """Find the parents, and regress means and log scales of the other coordinates on them.

    First each coordinate is regressed on all before it, because models draw parents before children. A coordinate is a
    parent if it explains the size of the residual of another (see `EXPLAINED`), and scales all of which it explains
    some (see `SCALED`). Then means and log scales are regressed in turn, by weighted least squares. The result is the
    identity unless it passes `GAIN`.

    Args:
        values: draws.
        gradient: gradient of their log density.
    """
    low, centre, high = jnp.quantile(values, jnp.array([0.25, 0.5, 0.75], values.dtype), axis=0)
    width = (high - low) / QUARTILES + 1e-30
    parents, useful, scaled = _find((values - centre) / width)
    rows = design(values[:, parents], centre[parents], width[parents])
    rows = rows * jnp.concatenate([jnp.ones(1, bool), useful])
    ones, zeros = jnp.ones_like(values), jnp.zeros((rows.shape[1], values.shape[1]), values.dtype)

    def sweep(_, found):
        log_scale = _regress(rows, log_square(values - rows @ found[0]), ones)
        return _regress(rows, values, jnp.exp(-2 * rows @ log_scale)), log_scale

    mean, log_scale = jax.lax.fori_loop(0, NUM_SWEEPS, sweep, (zeros.at[0].set(centre), zeros))
    identity = Scales(parents, centre[parents], width[parents], zeros, zeros)
    scales = dataclasses.replace(identity, mean=mean * scaled, log_scale=log_scale * scaled)
    w = scales.inverse(values)
    before, after = (fisher_product(v, g).sum() for v, g in ((values, gradient), (w, pull(scales, w, gradient))))
    return jax.tree.map(lambda a, b: jnp.where(after < GAIN * before, a, b), scales, identity)


def _find(unit: Float[Array, "num dim"]) -> tuple[Int[Array, " parents"], Bool[Array, " parents"], Bool[Array, " dim"]]:
    """Find the parents, the most useful first; which of these are of any use; and the coordinates that they scale."""
    residual = jax.scipy.linalg.solve_triangular(spread(unit, 1e-6), unit.T, lower=True).T
    unit = jnp.clip(unit, -FARTHEST, FARTHEST)
    explained = _explained(unit, log_square(residual))
    is_parent = (explained > EXPLAINED).any(1)
    scaled = ((explained > SCALED) & is_parent[:, None]).any(0) & ~is_parent
    usefulness = jnp.where(scaled, explained + _explained(unit, unit), 0.0).max(1) * ~scaled
    most, parents = jax.lax.top_k(usefulness, min(MAX_PARENTS, unit.shape[1]))
    return parents, most > 0, scaled


def log_square(deviation: Float[Array, "num dim"]) -> Float[Array, "num dim"]:
    """Compute (log deviation^2 + 1.27) / 2. For normal deviations its mean is the log of their standard deviation."""
    return 0.5 * (jnp.log(deviation**2 + 1e-30) - MEAN_LOG_SQUARE)


def _explained(a: Float[Array, "num dim"], b: Float[Array, "num dim"]) -> Float[Array, "dim dim"]:
    """Compute the squared correlation of each column of ``a`` with each other column of ``b``."""
    a, b = ((c - c.mean(0)) / (c.std(0) + 1e-30) for c in (a, b))
    return (a.T @ b / a.shape[0]) ** 2 * (1 - jnp.eye(a.shape[1], dtype=a.dtype))


def _regress(
    rows: Float[Array, "num terms"], targets: Float[Array, "num dim"], precision: Float[Array, "num dim"]
) -> Float[Array, "terms dim"]:
    """Regress each column of ``targets`` on ``rows`` by least squares, weighted by its own precisions.

    The ridge of 1e-6 keeps columns of zeros, those of useless parents, from making the system singular.
    """

    def solve(target, precision):
        weighted = rows.T * (precision / precision.mean())
        gram = weighted @ rows / len(target)
        return jnp.linalg.solve(gram + 1e-6 * jnp.eye(len(gram), dtype=gram.dtype), weighted @ target / len(target))

    return jax.vmap(solve, in_axes=1, out_axes=1)(targets, precision)
