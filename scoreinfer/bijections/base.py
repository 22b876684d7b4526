"""Changes of variables: an invertible map w -> z, and what it does to densities and their gradients.

With z = T(w), densities and gradients obey

    log p_w(w) = log p_z(z) + log |det dT/dw|,
    grad_w log p_w = (dT/dw)^T grad_z log p_z + grad_w log |det dT/dw|.

References: Papamakarios et al. 2021, arXiv 1912.02762, section 2.1.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@runtime_checkable
class Change(Protocol):
    """A change of variables, that is, a bijection w -> z. Batch axes come first."""

    def forward(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z = T(w)."""

    def inverse(self, z: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute w from z."""

    def log_det(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num"]:
        """Compute log |det dT/dw|."""


class Chain(eqx.Module):
    """The composition of several maps: the first of ``changes`` comes first."""

    changes: tuple[Change, ...]

    def forward(self, w):
        """Compute z from w."""
        for change in self.changes:
            w = change.forward(w)
        return w

    def inverse(self, z):
        """Compute w from z."""
        for change in reversed(self.changes):
            z = change.inverse(z)
        return z

    def log_det(self, w):
        """Compute the sum of the maps' log determinants, each at its own input."""
        total = jnp.zeros(w.shape[:-1], w.dtype)
        for change in self.changes:
            total = total + change.log_det(w)
            w = change.forward(w)
        return total


def pull(change: Change, w: Float[Array, "*num dim"], gradient: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
    """Compute grad_w log p_w at ``w`` from ``gradient``, which is grad_z log p_z at z = T(w)."""
    (_, log_det), transpose = jax.vjp(lambda w: (change.forward(w), change.log_det(w)), w)
    return transpose((gradient, jnp.ones_like(log_det)))[0]


def fisher_product(values: Float[Array, "num dim"], gradient: Float[Array, "num dim"]) -> Float[Array, " dim"]:
    """Compute Var[z_i] E[(d log p / d z_i)^2] of each coordinate: its variance times its Fisher information.

    By the Cramer-Rao inequality it is at least 1. It is 1 where the coordinate is normal and independent of the others.
    A large value means that the density has details much narrower than its whole width. Such a coordinate is hard for
    a score network, and makes the step of a Langevin move short.

    Args:
        values: draws.
        gradient: gradient of their log density.
    """
    return values.var(0) * (gradient**2).mean(0)


def spread(
    values: Float[Array, "num dim"], ridge: float | Float[Array | np.ndarray, ""] = 1e-4
) -> Float[Array, "dim dim"]:
    """Compute the Cholesky factor of C + ridge diag(C) + 1e-12 I, where C is the covariance of draws.

    Args:
        values: draws.
        ridge: share by which the variances are raised, so that a nearly singular C has a factor. Chosen by judgement:
            far above the rounding of float32 (1e-7), and standard deviations change by 0.005 percent only. The 1e-12
            is for coordinates that do not vary.
    """
    covariance = jnp.atleast_2d(jnp.cov(values, rowvar=False))
    return jnp.linalg.cholesky(covariance + jnp.diag(ridge * covariance.diagonal() + 1e-12))
