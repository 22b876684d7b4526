"""Affine maps with a lower-triangular matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Affine(eqx.Module):
    """The map u -> z = mean + F u, where F is lower triangular.

    Args:
        mean: z at u = 0.
        factor: F. Its diagonal must not contain zeros.
    """

    mean: Float[Array, " dim"]
    factor: Float[Array, "dim dim"]

    def forward(self, u: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z from u."""
        return self.mean + (self.factor @ u[..., None])[..., 0]

    def inverse(self, z: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute u = F^{-1} (z - mean) from z."""
        columns = (z - self.mean).reshape(-1, self.mean.size).T
        return jax.scipy.linalg.solve_triangular(self.factor, columns, lower=True).T.reshape(z.shape)

    def log_det(self, u: Float[Array, "*num dim"]) -> Float[Array, "*num"]:
        """Compute log |det F|, the same at every u."""
        return jnp.broadcast_to(jnp.log(jnp.abs(jnp.diagonal(self.factor))).sum(), u.shape[:-1])

    def after(self, first: "Affine") -> "Affine":
        """Compose two maps: ``first``, then this one."""
        return Affine(self.forward(first.mean), self.factor @ first.factor)


def identity(dim: int) -> Affine:
    """Make the map z = u."""
    return Affine(jnp.zeros(dim, jnp.float32), jnp.eye(dim, dtype=jnp.float32))
