"""Scores in closed form, of Gaussians, of mixtures of them, of finite samples, and of a user's own densities.

Given x_s = x, Bayes' rule for a mixture sum_i w_i N(m_i, C_i) of x_0 gives

    D = sum_i r_i (m_i + C_i (C_i + s^2 I)^{-1} (x - m_i)),        r_i proportional to w_i N(x; m_i, C_i + s^2 I).

References: Bishop 2006, "Pattern Recognition and Machine Learning", equations 2.116 and 9.13.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.score.base import AbstractScore, Level, State


class GaussianScore(AbstractScore):
    """The score of N(mean, covariance).

    Exactness: exact.

    >>> score = GaussianScore(jnp.zeros(1), jnp.eye(1))
    >>> float(score(jnp.array(1.0), jnp.array([3.0]))[0])  # - 3 / (1 + 1)
    -1.5
    """

    mean: Float[Array, " dim"]
    covariance: Float[Array, "dim dim"]

    def denoise(self, level, x, y=None):
        """Compute D = mean + C (C + s^2 I)^{-1} (x - mean)."""
        noisy = self.covariance + level**2 * jnp.eye(self.mean.size)
        return self.mean + self.covariance @ jnp.linalg.solve(noisy, x - self.mean)


class MixtureScore(AbstractScore):
    """The score of the mixture sum_i weights_i N(means_i, scales_i^2 I).

    Exactness: exact.
    """

    weights: Float[Array, " num"]
    means: Float[Array, "num dim"]
    scales: Float[Array, " num"]

    def denoise(self, level, x, y=None):
        """Compute the average of the components' denoisers, weighted by their responsibilities r_i."""
        variance = self.scales**2 + level**2
        squares = jnp.sum((x - self.means) ** 2, axis=1)
        log_part = jnp.log(self.weights) - 0.5 * squares / variance - 0.5 * x.size * jnp.log(variance)
        shrink = (self.scales**2 / variance)[:, None]
        return jax.nn.softmax(log_part) @ (self.means + shrink * (x - self.means))


class EnsembleScore(AbstractScore):
    """The score of a weighted sample: of the distribution that has mass exp(log_weight_i) at points_i.

    Exactness: exact for the sample itself. For the distribution that the sample was drawn from it is consistent as the
    sample grows. It is far off at noise levels below the distance between points: there it leads to the points.
    """

    points: Float[Array, "num dim"]
    log_weight: Float[Array, " num"]

    def denoise(self, level, x, y=None):
        """Compute the average of the points, with weights proportional to exp(log_weight_i) N(x; points_i, s^2 I)."""
        squares = jnp.sum((x - self.points) ** 2, axis=1)
        return jax.nn.softmax(self.log_weight - 0.5 * squares / level**2) @ self.points


class DensityScore(AbstractScore):
    """The score of a user's own log density at every level, by differentiation: D = x + s^2 grad log p(x_s).

    Args:
        log_density: ``(level, x) -> log p(x_s)`` of x_s = x_0 + s e, up to a constant that may depend on the level.

    Exactness: exact, if the density of every level is that of the same x_0 plus noise.

    >>> score = DensityScore(lambda level, x: -0.5 * (x**2).sum() / (1 + level**2))
    >>> float(score(jnp.array(1.0), jnp.array([3.0]))[0])
    -1.5
    """

    log_density: Callable[[Level, State], Float[Array, ""]]

    def denoise(self, level, x, y=None):
        """Compute D."""
        return x + level**2 * jax.grad(self.log_density, argnums=1)(level, x)
