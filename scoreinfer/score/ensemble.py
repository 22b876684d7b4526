"""Scores that training-free filters fit to an ensemble, and the published ensemble score filter's.

A filter that runs a score backwards needs that of the forecast, given by an ensemble, and that of the likelihood. The
members' own score (`scoreinfer.score.EnsembleScore`) leads back to the members. A Gaussian with local covariances, or
a mixture of such around shrunken members, leads to a distribution. The exact posterior's denoiser is E[x_0 | x_s, y];
`PublishedScore` adds a damped gradient of log p(y | x_s) to one member's denoiser instead.

References: Bao, Zhang and Zhang 2024, CMAME 432, arXiv 2309.00983 (EnSF); West 1993, JRSS B 55(2) (shrunken mixtures).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer.score.base import AbstractScore, State


class LocalGaussianScore(AbstractScore):
    """The score of a Gaussian, each component by a block of those near it.

    Args:
        mean: the mean.
        index: numbers of the components of every block, its centre first.
        covariance: covariance of every block.

    Exactness: exact where every block holds all components; otherwise biased: the rest is taken as uncorrelated.

    >>> score = LocalGaussianScore(jnp.zeros(1), jnp.zeros((1, 1), int), jnp.ones((1, 1, 1)))
    >>> float(score(jnp.array(1.0), jnp.array([3.0]))[0])  # - 3 / (1 + 1)
    -1.5
    """

    mean: State
    index: Int[Array, "dim block"]
    covariance: Float[Array, "dim block block"]

    def denoise(self, level, x, y=None):
        """Compute D_i = m_i + C_i. (C + s^2 I)^{-1} (x - m) on the block of i."""
        off = (x - self.mean)[self.index]
        noisy = self.covariance + level**2 * jnp.eye(self.index.shape[1])
        inner = jnp.linalg.solve(noisy, off[..., None])[..., 0]
        return self.mean + jnp.sum(self.covariance[:, 0] * inner, axis=1)


class ShrunkenMixtureScore(AbstractScore):
    """The score of sum_j w_j N(m + sqrt(1 - h^2) (x_j - m), h^2 C): a mixture that has the members' moments.

    Args:
        points: the members x_j.
        log_weight: their log weights.
        covariance: C, their covariance.
        bandwidth: h. With h = 1 it is the Gaussian; as h goes to 0 it is the members' own distribution.

    Exactness: exact for the mixture; consistent for the distribution of the members as their number grows and h falls.
    """

    points: Float[Array, "num dim"]
    log_weight: Float[Array, " num"]
    covariance: Float[Array, "dim dim"]
    bandwidth: float | Float[Array, ""]

    def denoise(self, level, x, y=None):
        """Compute the average of the components' denoisers, weighted by their responsibilities."""
        mean = jax.nn.softmax(self.log_weight) @ self.points
        centre = mean + jnp.sqrt(1.0 - self.bandwidth**2) * (self.points - mean)
        inner = self.bandwidth**2 * self.covariance
        off = x - centre
        solved = jnp.linalg.solve(inner + level**2 * jnp.eye(x.size), off.T).T
        share = jax.nn.softmax(self.log_weight - 0.5 * jnp.sum(off * solved, axis=1))
        return share @ (centre + solved @ inner)


class PublishedScore(AbstractScore):
    """The score that the published ensemble score filter follows from one member.

    In the filter's own time, z_t = alpha_t x_0 + beta_t e with

        alpha_t = 1 - (1 - a) t,        beta_t^2 = b + (1 - b) t,        0 <= t <= 1,

    and the score is -(z - alpha_t x_j) / beta_t^2 + (1 - t) grad log p(y | z). Here x_s = z / alpha_t, s = beta_t /
    alpha_t, so that the denoiser is x_j + s^2 alpha_t (1 - t) grad log p(y | alpha_t x_s): the member, moved by the
    likelihood at a *noisy* state, with a factor 1 - t that no model implies.

    Args:
        point: the member x_j.
        log_likelihood: log p(y | x).
        eps_alpha: a.
        eps_beta: b.

    Exactness: heuristic: not the score of a posterior. The likelihood acts at the end of the run only, so with more
        steps the run returns the member.

    References: Bao, Zhang and Zhang 2024, arXiv 2309.00983, equations 3.4, 3.12 and 3.18.
    """

    point: State
    log_likelihood: Callable[[State], Float[Array, ""]]
    eps_alpha: float = eqx.field(static=True, default=0.5)
    eps_beta: float = eqx.field(static=True, default=0.025)

    def alpha(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """Compute alpha_t."""
        return 1.0 - (1.0 - self.eps_alpha) * t

    def square(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """Compute beta_t^2."""
        return self.eps_beta + (1.0 - self.eps_beta) * t

    def time(self, level: Float[Array, ""]) -> Float[Array, ""]:
        """Find the time at which beta_t / alpha_t is ``level``: the smaller root of a quadratic."""
        a, s = 1.0 - self.eps_alpha, level**2
        half = s * a + 0.5 * (1.0 - self.eps_beta)
        return (s - self.eps_beta) / (half + jnp.sqrt(half**2 - (s * a**2) * (s - self.eps_beta)))

    def at(self, t: Float[Array, ""], z: State) -> State:
        """Compute the score in the filter's own time."""
        prior = -(z - self.alpha(t) * self.point) / self.square(t)
        return prior + (1.0 - t) * jax.grad(self.log_likelihood)(z)

    def denoise(self, level, x, y=None):
        """Compute x_j + s^2 alpha_t (1 - t) grad log p(y | alpha_t x)."""
        t = self.time(level)
        alpha = self.alpha(t)
        return x + level**2 * alpha * self.at(t, alpha * x)
