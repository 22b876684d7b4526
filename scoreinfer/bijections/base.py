"""Changes of variables: what a map, its inverse and its Jacobian do to densities and their gradients."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Change(Protocol):
    """An invertible map w -> z."""

    def forward(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z from w."""

    def inverse(self, z: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute w from z."""

    def log_det(self, w: Float[Array, "*num dim"]) -> Float[Array, "*num"]:
        """Compute the logarithm of the Jacobian determinant."""


class Chain(eqx.Module):
    """Several maps, one after the other."""

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
        """Compute the logarithm of the Jacobian determinant."""
        total = jnp.zeros(w.shape[:-1], w.dtype)
        for change in self.changes:
            total = total + change.log_det(w)
            w = change.forward(w)
        return total


def pull(change: Change, w: Float[Array, "*num dim"], gradient: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
    """Compute the gradient of the log density of w from that of z."""
    (_, log_det), transpose = jax.vjp(lambda w: (change.forward(w), change.log_det(w)), w)
    return transpose((gradient, jnp.ones_like(log_det)))[0]


def push(change: Change, w: Float[Array, "*num dim"], gradient: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
    """Compute the gradient of the log density of z from that of w."""
    log_det, transpose = jax.vjp(change.log_det, w)
    _, transposed_inverse = jax.vjp(change.inverse, change.forward(w))
    return transposed_inverse(gradient - transpose(jnp.ones_like(log_det))[0])[0]


def fisher_product(values: Float[Array, "num dim"], gradient: Float[Array, "num dim"]) -> Float[Array, " dim"]:
    """Compute each coordinate's variance times its Fisher information.

    It is 1 for a normal coordinate that is independent of the others and more for any other: the mean square of what a
    score network has to learn, and what limits the step of a Langevin move.
    """
    return values.var(0) * (gradient**2).mean(0)


def spread(values: Float[Array, "num dim"], ridge: float = 1e-4) -> Float[Array, "dim dim"]:
    """Compute the Cholesky factor of the covariance of draws, its diagonal raised a little, to scale moves with."""
    covariance = jnp.atleast_2d(jnp.cov(values, rowvar=False))
    return jnp.linalg.cholesky(covariance + jnp.diag(ridge * covariance.diagonal() + 1e-12))
