"""Affine maps with a lower-triangular factor."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Affine(eqx.Module):
    """The map u -> z = mean + factor u, with a lower-triangular factor."""

    mean: Float[Array, " dim"]
    factor: Float[Array, "dim dim"]

    def forward(self, u: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Compute z from u."""
        return self.mean + self.factor @ u

    def inverse(self, z: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Compute u from z."""
        return jax.scipy.linalg.solve_triangular(self.factor, z - self.mean, lower=True)

    def log_det(self, u: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log |det factor|, the same at every u."""
        return jnp.log(jnp.abs(jnp.diagonal(self.factor))).sum()

    def after(self, first: "Affine") -> "Affine":
        """Compose two maps: ``first``, then this one."""
        return Affine(self.forward(first.mean), self.factor @ first.factor)


def identity(dim: int) -> Affine:
    """Make the map that leaves everything where it is."""
    return Affine(jnp.zeros(dim, jnp.float32), jnp.eye(dim, dtype=jnp.float32))
