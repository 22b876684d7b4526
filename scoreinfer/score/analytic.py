"""Scores in closed form: oracles for every sampler, and the ensemble score of a finite sample."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.score.base import AbstractScore


class GaussianScore(AbstractScore):
    """Exact score of N(mean, covariance) at every noise level.

    >>> score = GaussianScore(jnp.zeros(1), jnp.eye(1))
    >>> float(score(jnp.array(1.0), jnp.array([3.0]))[0])  # - 3 / (1 + 1)
    -1.5
    """

    mean: Float[Array, " dim"]
    covariance: Float[Array, "dim dim"]

    def denoise(self, level, x, y=None):
        """Compute mean + C (C + s^2 I)^{-1} (x - mean)."""
        noisy = self.covariance + level**2 * jnp.eye(self.mean.size)
        return self.mean + self.covariance @ jnp.linalg.solve(noisy, x - self.mean)


class MixtureScore(AbstractScore):
    """Exact score of a mixture of isotropic Gaussians at every noise level."""

    weights: Float[Array, " num"]
    means: Float[Array, "num dim"]
    scales: Float[Array, " num"]

    def denoise(self, level, x, y=None):
        """Compute the responsibilities' average of the components' denoisers."""
        variance = self.scales**2 + level**2
        squares = jnp.sum((x - self.means) ** 2, axis=1)
        log_part = jnp.log(self.weights) - 0.5 * squares / variance - 0.5 * x.size * jnp.log(variance)
        shrink = (self.scales**2 / variance)[:, None]
        return jax.nn.softmax(log_part) @ (self.means + shrink * (x - self.means))


class EnsembleScore(AbstractScore):
    """Exact score of the empirical distribution of a (weighted) sample.

    Exactness: exact for the empirical distribution; as an estimate of the score of what the sample came from it is
    consistent as the sample grows, and memorises the sample at small noise levels.
    """

    points: Float[Array, "num dim"]
    log_weight: Float[Array, " num"]

    def denoise(self, level, x, y=None):
        """Compute the average of the points under the kernel weights at ``x``."""
        squares = jnp.sum((x - self.points) ** 2, axis=1)
        return jax.nn.softmax(self.log_weight - 0.5 * squares / level**2) @ self.points
