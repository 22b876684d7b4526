r"""Learned scores that begin as the score of a Gaussian, and learn what it leaves.

With x_0 of mean m and covariance Q L Q^T, z = Q^T (x - m), and noise level s, the denoiser is

    D(x, s) = m + Q [L / (L + s^2) z + (L s^2 / (L + s^2))^{1/2} F(z / (L + s^2)^{1/2}, log s)].

With F = 0 it is the denoiser of the Gaussian. In every direction, however narrow, and at every level F is given numbers
of unit variance, and is asked for numbers of about unit variance: windows of smooth paths are a thousand times narrower
in some directions than in others. For L = 1 these are the scales of `scoreinfer.score.network`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer.score.base import AbstractScore


class ResidualScore(AbstractScore):
    """The denoiser of a Gaussian plus what a network adds (see the module).

    Args:
        mean: m.
        basis: Q, orthogonal.
        variance: L, positive.
        network: ``(z, log s, context) -> dim`` numbers: F.

    Exactness: biased: as good as its training.
    """

    mean: Float[Array, " dim"]
    basis: Float[Array, "dim dim"]
    variance: Float[Array, " dim"]
    network: Callable[[Array, Array, PyTree], Array]

    def denoise(self, level, x, y=None):
        """Compute D; ``y`` is the network's context."""
        level = jnp.float32(level)
        z = self.split(x)
        keep, out, unit = self.scales(level)
        found = keep * z + out * self.network(unit * z, jnp.log(level), jnp.zeros(0, jnp.float32) if y is None else y)
        return self.mean + self.basis @ found

    def split(self, x: Float[Array, "*num dim"]) -> Float[Array, "*num dim"]:
        """Compute z, the coordinates of ``x`` along the principal directions."""
        return (x - self.mean).astype(jnp.float32) @ self.basis

    def scales(self, level: Float[Array, "*num"]) -> tuple[Array, Array, Array]:
        """Compute L / (L + s^2), (L s^2 / (L + s^2))^{1/2} and (L + s^2)^{-1/2}."""
        total = self.variance + level[..., None] ** 2
        return self.variance / total, level[..., None] * jnp.sqrt(self.variance / total), 1 / jnp.sqrt(total)
