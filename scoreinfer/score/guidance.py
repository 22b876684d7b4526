"""Guidance: a score of the posterior, made from a score of the prior and a likelihood, without training.

Given x_s, the prior's x_0 has mean D and covariance V = s^2 dD/dx (Tweedie). *Moment matching* takes it for Gaussian,
N(D, V), and conditions this Gaussian on the observation (`scoreinfer.score.likelihood`): its mean is D_y, its
covariance V_y, and its evidence psi(x_s), an approximation of p(y | x_s).

No guidance is calibrated by itself: the law of x_0 given x_s is not Gaussian. The weights of
`scoreinfer.samplers.twisted`, which use V_y for the spread of a step and psi as twist, correct any of them exactly.

References: Rozet et al. 2024, arXiv 2405.13712 (moment matching); Boys et al. 2023, arXiv 2310.06721 (its
covariance); Wu et al. 2023, arXiv 2306.17775 (guidance as a twist); Rozet and Louppe 2023, arXiv 2306.10574; Chung et
al. 2023, arXiv 2209.14687.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer.process.base import LOG_2PI
from scoreinfer.score.base import AbstractScore, Level, Moments, State, positive_root
from scoreinfer.score.likelihood import AbstractLikelihood, GaussianLikelihood
from scoreinfer.score.solve import conjugate_gradients

MAX_DENSE = 80
"""Most components of x, or predictors, whose covariance is a matrix: an eigendecomposition of this size takes about a
millisecond. Chosen by judgement."""

LEAST_LEFT = 1e-3
"""Least share of a component's variance that an observation leaves, for large states. Chosen by judgement."""


class Guided(NamedTuple):
    """Everything that a sampler needs at one noisy state.

    Args:
        prior: moments of x_0 given x_s.
        posterior: moments of x_0 given x_s and y.
        log_twist: log psi, an approximation of log p(y | x_s).
    """

    prior: Moments
    posterior: Moments
    log_twist: Float[Array, ""]


class AbstractGuidance(AbstractScore):
    """A score of the posterior made from a score of the prior. To samplers it is a score like any other."""

    prior: eqx.AbstractVar[AbstractScore]
    likelihood: eqx.AbstractVar[AbstractLikelihood]

    @abc.abstractmethod
    def guide(self, level: Level, x: State, y: PyTree = None) -> Guided:
        """Compute the moments of x_0 before and after the observation, and the twist; ``y`` goes to the prior."""

    def denoise(self, level, x, y=None):
        """Compute D_y."""
        return self.guide(level, x, y).posterior.mean

    def moments(self, level, x, y=None):
        """Compute D_y and the diagonal of V_y."""
        posterior = self.guide(level, x, y).posterior
        return posterior.mean, posterior.variance

    def gaussian(self, level, x, y=None):
        """Compute D_y and V_y; of large states only its diagonal."""
        return self.guide(level, x, y).posterior


class MomentMatched(AbstractGuidance):
    """Guidance by the posterior of the Gaussian with the moments of x_0 given x_s (see the module).

    Up to `MAX_DENSE` components V is the whole matrix, made symmetric and positive. Beyond, V A^T comes from one
    vector-Jacobian product for each predictor; beyond `MAX_DENSE` predictors too, w is solved for with the symmetric
    part of A V A^T by conjugate gradients. These stop at a direction of negative curvature (the Jacobian of a learned
    denoiser is not a covariance), and where the residual stays large, the diagonal of `Steered` is used instead.

    Args:
        prior: the score of the prior.
        likelihood: the likelihood of the observation.
        num_solves: most steps of conjugate gradients.

    Raises:
        ValueError: if a state and its predictors are both large and the likelihood is not Gaussian.

    Exactness: exact for a Gaussian prior and a Gaussian likelihood with linear predictors; else biased: x_0 given x_s
        is not Gaussian. With conjugate gradients the covariance is that of the prior.

    References: Rozet et al. 2024, arXiv 2405.13712 (moment matching by conjugate gradients).

    >>> from scoreinfer.score import GaussianScore
    >>> seen = GaussianLikelihood(lambda x: x, jnp.array([2.0]), jnp.array([1.0]))
    >>> guided = MomentMatched(GaussianScore(jnp.zeros(1), jnp.eye(1)), seen)
    >>> round(float(guided.denoise(jnp.array(1.0), jnp.array([0.0]))[0]), 4)  # N(0, 1/2) given y = 2 of variance 1
    0.6667
    """

    prior: AbstractScore
    likelihood: AbstractLikelihood
    num_solves: int = eqx.field(static=True, default=5)

    def guide(self, level, x, y=None):
        """Compute D and V, and condition them on the observation."""
        if x.size <= MAX_DENSE:
            return self._dense(self.prior.gaussian(level, x, y))
        num = jax.eval_shape(self.likelihood.predict, x).size
        return self._rows(level, x, y) if num <= MAX_DENSE else self._solved(level, x, y)

    def _dense(self, prior: Moments) -> Guided:
        predict = self.likelihood.predict
        u = predict(prior.mean)
        rows = (jax.jacrev if u.size < prior.mean.size else jax.jacfwd)(predict)(prior.mean)
        return Guided(prior, *self.likelihood.pull(u, rows @ prior.factor).condition(prior, rows))

    def _rows(self, level: Level, x: State, y: PyTree) -> Guided:
        prior = _diagonal(self.prior, level, x, y)
        u, predictor_rows = jax.vjp(self.likelihood.predict, prior.mean)
        rows = jax.vmap(lambda e: predictor_rows(e)[0])(jnp.eye(u.size, dtype=u.dtype))
        gain = level**2 * self.prior.pull_rows(level, x, rows, y)  # the transpose of V A^T
        if isinstance(self.likelihood, GaussianLikelihood):
            return _conditioned(prior, self.likelihood, u, rows @ gain.T, gain)
        seen = Moments(u, positive_root(rows @ gain.T))
        given, log_twist = self.likelihood.pull(*seen).condition(seen, jnp.eye(u.size, dtype=u.dtype))
        back = jnp.linalg.pinv(seen.covariance, hermitian=True) @ gain
        variance = prior.variance - ((seen.factor @ back) ** 2).sum(0) + ((given.factor.T @ back) ** 2).sum(0)
        variance = jnp.maximum(variance, LEAST_LEFT * prior.variance)  # rows and variances need not agree
        return Guided(prior, Moments(prior.mean + (given.mean - u) @ back, jnp.sqrt(variance)), log_twist)

    def _solved(self, level: Level, x: State, y: PyTree) -> Guided:
        seen = self.likelihood
        if not isinstance(seen, GaussianLikelihood):
            raise ValueError(
                f"Moment matching for {x.size} components seen through more than {MAX_DENSE} predictors needs a "
                f"`GaussianLikelihood`, got a `{type(seen).__name__}`. Use `Steered`, or observe fewer numbers."
            )
        prior = _diagonal(self.prior, level, x, y)
        denoise = lambda v: self.prior.denoise(level, v, y)  # noqa: E731
        (u, forward), transpose = jax.linearize(seen.predict, prior.mean), jax.vjp(seen.predict, prior.mean)[1]
        ahead, back = jax.linearize(denoise, x)[1], jax.vjp(denoise, x)[1]

        def noisy(v: Float[Array, " obs"]) -> Float[Array, " obs"]:
            row = transpose(v)[0]
            return 0.5 * level**2 * forward(ahead(row) + back(row)[0]) + seen.scale**2 * v

        diagonal = seen.scale**2 + level**2 / (1 + level**2)
        weight = conjugate_gradients(noisy, seen.y - u, diagonal, self.num_solves)
        mean = prior.mean + level**2 * back(transpose(weight)[0])[0]
        log_twist = -0.5 * (weight @ (seen.y - u) + jnp.log(2 * jnp.pi * diagonal).sum())
        return Guided(prior, prior._replace(mean=mean), log_twist)


def _conditioned(
    prior: Moments,
    seen: GaussianLikelihood,
    u: Float[Array, " obs"],
    covariance: Float[Array, "obs obs"],
    gain: Float[Array, "obs dim"],
) -> Guided:
    """Condition a Gaussian on data around its predictors, which have a symmetric part of ``covariance``.

    In units of the data's noise the predictors' covariance is Q L Q^T, with L set to zero where it is negative; noise
    and predictors together have Q (1 + L) Q^T.
    """
    unit_covariance = 0.5 * (covariance + covariance.T) / seen.scale / seen.scale[:, None]
    values, vectors = jnp.linalg.eigh(unit_covariance)
    root = jnp.sqrt(1 + jnp.maximum(values, 0.0))
    unit = vectors.T @ ((seen.y - u) / seen.scale) / root
    back = vectors.T @ (gain / seen.scale[:, None]) / root[:, None]
    variance = jnp.maximum(prior.variance - (back**2).sum(0), LEAST_LEFT * prior.variance)
    log_twist = -0.5 * (unit**2 + LOG_2PI).sum() - jnp.log(seen.scale * root).sum()
    return Guided(prior, Moments(prior.mean + unit @ back, jnp.sqrt(variance)), log_twist)


class AbstractGradient(AbstractGuidance):
    """Guidance by the gradient of a twist: D_y = D + s^2 grad log psi(x_s). The covariance is that of the prior."""

    @abc.abstractmethod
    def log_twist(self, level: Level, mean: State) -> Float[Array, ""]:
        """Compute log psi from D."""

    def guide(self, level, x, y=None):
        """Compute D + s^2 grad log psi, V of the prior, and log psi."""

        def twist(v: State) -> Float[Array, ""]:
            return self.log_twist(level, self.prior.denoise(level, v, y))

        prior = moments_of(self.prior, level, x, y)
        log_twist, gradient = jax.value_and_grad(twist)(x)
        return Guided(prior, prior._replace(mean=prior.mean + level**2 * gradient), log_twist)


class Steered(AbstractGradient):
    """Score-based data assimilation: psi = N(y; predict(D), scale^2 + gamma s^2).

    Exactness: biased: the law of the predictors given x_s is not N(predict(D), gamma s^2), not even for a Gaussian
        prior. For comparison.

    References: Rozet and Louppe 2023, arXiv 2306.10574 (perturbed likelihood).
    """

    prior: AbstractScore
    likelihood: GaussianLikelihood
    gamma: float = 1e-2

    def log_twist(self, level, mean):
        """Compute log N(y; predict(D), scale^2 + gamma s^2)."""
        scale = jnp.sqrt(self.likelihood.scale**2 + self.gamma * level**2)
        return eqx.tree_at(lambda seen: seen.scale, self.likelihood, scale).log_density(mean)


class Published(AbstractGradient):
    """Diffusion posterior sampling: grad log psi = -zeta grad |y - predict(D)|^2 / |y - predict(D)|.

    The published step size, zeta over the norm of the residual, is read as a factor of the score.

    Exactness: biased: it takes x_0 given x_s for the point D, and its step size for a constant. For comparison.

    References: Chung et al. 2023, arXiv 2209.14687.
    """

    prior: AbstractScore
    likelihood: GaussianLikelihood
    zeta: float = 1.0

    def log_twist(self, level, mean):
        """Compute -2 zeta |y - predict(D)|, whose gradient is that of the class."""
        square = ((self.likelihood.y - self.likelihood.predict(mean)) ** 2).sum()
        return -2 * self.zeta * jnp.sqrt(square + jnp.finfo(mean.dtype).tiny)


def moments_of(score: AbstractScore, level: Level, x: State, y: PyTree = None) -> Moments:
    """Compute mean and covariance of x_0 given x_s: of up to `MAX_DENSE` components a matrix, else its diagonal."""
    return score.gaussian(level, x, y) if x.size <= MAX_DENSE else _diagonal(score, level, x, y)


def _diagonal(score: AbstractScore, level: Level, x: State, y: PyTree) -> Moments:
    mean, variance = score.moments(level, x, y)
    return Moments(mean, jnp.sqrt(jnp.maximum(variance, 0.0)))
