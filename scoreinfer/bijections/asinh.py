"""Tails: a map that draws heavy tails in, coordinate by coordinate, so that one step size and one network suit them.

Under a wide prior on a scale, a coordinate is narrow in the middle and wide outside. Seen through asinh it has about
the same spread everywhere.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.bijections.base import fisher_product, pull

WIDTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Widths that are tried, in units of half the interquartile range."""
GAIN, ENOUGH = 0.5, 50.0
"""A coordinate is bent only where that leaves at most this share of its Fisher information, and no more than enough:
what is left of separate modes is more, and bending makes some of them narrower."""


class Tails(eqx.Module):
    """The map w -> z = centre + sinh(bend w) / bend of every coordinate; bend 0 shifts it alone."""

    centre: Float[Array, " dim"]
    bend: Float[Array, " dim"]

    def forward(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z from w."""
        return self.centre + jnp.where(self.bend > 0, jnp.sinh(self.bend * w) / self._safe, w)

    def inverse(self, z: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute w from z."""
        z = z - self.centre
        return jnp.where(self.bend > 0, jnp.arcsinh(self.bend * z) / self._safe, z)

    def slope(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute dz/dw."""
        return jnp.cosh(self.bend * w)

    def log_det(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num"]:
        """Compute the logarithm of the Jacobian determinant."""
        return jnp.log(self.slope(w)).sum(-1)

    @property
    def _safe(self):
        return jnp.where(self.bend > 0, self.bend, 1.0)


def fit_tails(values: Float[Array, "num dim"], gradient: Float[Array, "num dim"]) -> Tails:
    """Choose the bend of every coordinate that makes the draws' variance times their Fisher information smallest.

    Args:
        values: draws.
        gradient: gradient of their log density.
    """
    low, centre, high = jnp.quantile(values, jnp.array([0.25, 0.5, 0.75], values.dtype), axis=0)
    half = 0.5 * (high - low)
    bends = jnp.stack([0 * half, *(1.0 / (width * half + 1e-30) for width in WIDTHS)])

    def product(bend):
        tails = Tails(centre, bend)
        w = tails.inverse(values)
        return fisher_product(w, pull(tails, w, gradient))

    products = jax.vmap(product)(bends)
    products = jnp.where(jnp.isfinite(products), products, jnp.inf)
    best = jnp.argmin(products, axis=0)
    chosen = jnp.take_along_axis(bends, best[None], axis=0)[0]
    good = products.min(0) < jnp.minimum(GAIN * products[0], ENOUGH)
    return Tails(centre, jnp.where(good, chosen, 0.0))
