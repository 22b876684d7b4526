"""Model error as a scale mixture whose weights are learned on the way.

Beside the forecast's own variance P_i, every point may have white noise of standard deviation beta_k, with weight pi_k;
beta_0 = 0. With the scalar evidences

    l_ik = log int p(y_i | x) N(x; m_i, P_i + beta_k^2) dx

of the points near i, tapered, the weights of the scales at i are p_i(k), proportional to pi_k exp(sum_j rho_ij l_jk).
The variance added at i is sum_k p_i(k) beta_k^2. Then pi moves towards the mean of p over the points that are informed.

*Sparse*: at first all scales but 0 have tiny weights, and as long as pi_0 is near one, noise is added only at points
whose own p_i(0) is not. Where observations say nothing of small noise, the evidences are flat, p stays pi, and nothing
is added: noise of any size blurs the correlations of a small ensemble. Where noise is real, the evidences of one
analysis outweigh any tiny weight. Then pi_0 falls, and noise is added everywhere by its weights, also at points of
which the observations say little at that time.

The scales are multiples of each component's standard deviation over members and time so far (its climate).

References: Anderson 2009, Tellus A 61 (inflation varying in space and time, learned from innovations); Raanes, Bocquet
and Carrassi 2019, QJRMS 145 (Gaussian scale mixtures).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._quadrature import LogLikelihood, Numbers, tilt
from scoreinfer._typing import Key
from scoreinfer.filters.sites import Prior, over_points
from scoreinfer.filters.taper import Locality

SCALES = 0.01, 0.03, 0.1, 0.3, 1.0, 3.0
"""Standard deviations, relative to the climate's."""


class Climate(NamedTuple):
    """Mean and mean square of every component, over members and times so far.

    Args:
        num: number of times.
        mean: the mean.
        square: the mean of squares about zero.
    """

    num: Float[Array, ""]
    mean: Numbers
    square: Numbers

    @property
    def sd(self) -> Numbers:
        """The standard deviation of every component."""
        return jnp.sqrt(jnp.maximum(self.square - self.mean**2, 0.0))

    def seen(self, x: Float[Array, "num points"]) -> "Climate":
        """Take the members of one more time in."""
        num = self.num + 1.0
        mean, square = x.mean(0), (x**2).mean(0)
        return Climate(num, self.mean + (mean - self.mean) / num, self.square + (square - self.square) / num)


class Error(NamedTuple):
    """What is believed of the model's error.

    Args:
        log_weight: log pi_k, the scale 0 first.
        climate: mean and spread of the state so far.
    """

    log_weight: Float[Array, " scales"]
    climate: Climate


class Jumps(eqx.Module):
    """The scale mixture.

    Args:
        scales: beta_k relative to the climate's standard deviation, without the scale 0.
        first_weight: weight of each of them before the first analysis.
        rate: how far pi moves in one analysis.
        least: pi_k never falls below this share of its first value.
        right: the model counts as right while the scale 0 has this weight pi_0 or more.
        sure: then nothing is added at a point where the scale 0 has this weight p_i(0) or more.

    Good values: the defaults. With ``first_weight`` of .02 and more, forecasts whose observations are vague are
        inflated without need (Lorenz-96, linear, .22 instead of .19).
    """

    scales: tuple[float, ...] = eqx.field(static=True, default=SCALES)
    first_weight: float = eqx.field(static=True, default=1e-3)
    rate: float = eqx.field(static=True, default=0.05)
    least: float = eqx.field(static=True, default=0.1)
    right: float = eqx.field(static=True, default=0.98)
    sure: float = eqx.field(static=True, default=0.9)

    @property
    def first(self) -> Float[Array, " scales"]:
        """Log weights before the first analysis."""
        rest = jnp.full(len(self.scales), self.first_weight)
        return jnp.log(jnp.concatenate([1.0 - rest.sum(keepdims=True), rest]))

    def init(self, x: Float[Array, "num points"]) -> Error:
        """Begin with the first members."""
        nothing = jnp.zeros(x.shape[1], x.dtype)
        return Error(self.first.astype(x.dtype), Climate(jnp.zeros((), x.dtype), nothing, nothing).seen(x))

    def variances(self, unit: Numbers) -> Float[Array, "scales points"]:
        """Compute the variance beta_k^2 of every scale at every point; ``unit`` is a climate's standard deviation."""
        return (jnp.asarray((0.0, *self.scales), unit.dtype)[:, None] * unit) ** 2

    def infer(
        self,
        error: Error,
        prior: Prior,
        scales: Float[Array, "scales points"],
        log_likelihood: LogLikelihood,
        informed: Bool[Array, " points"],
    ) -> tuple[Error, Numbers]:
        """Weigh the scales at every point, and learn.

        Args:
            error: the belief so far.
            prior: the forecast.
            scales: variances of the scales.
            log_likelihood: log likelihood of every point.
            informed: which points have one.

        Returns:
            the new belief, and the variance to be added to every point.

        Exactness: biased: neighbours' evidences are summed as if they were independent.
        """
        mean, variance = prior.mean, prior.variance
        evidence = jax.vmap(lambda added: tilt(log_likelihood, mean, variance + added).log_evidence)(scales)
        pooled = _pooled(jnp.where(informed, evidence, 0.0), prior.locality)
        share = jax.nn.softmax(error.log_weight[:, None] + pooled, axis=0)
        seen = jnp.where(informed, share, 0.0).sum(1) / jnp.maximum(informed.sum(), 1)
        sparse = (error.log_weight[0] >= jnp.log(self.right)) & (share[0] >= self.sure)
        added = jnp.where(sparse, 0.0, (share * scales).sum(0))
        return error._replace(log_weight=self._learned(error.log_weight, seen)), added

    def _learned(self, log_weight, seen):
        """Move pi, and keep every scale possible."""
        moved = (1.0 - self.rate) * jnp.exp(log_weight) + self.rate * seen
        moved = jnp.maximum(moved, self.least * jnp.exp(self.first))
        return jnp.log(moved / moved.sum())


def _pooled(evidence: Float[Array, "scales points"], locality: Locality) -> Float[Array, "scales points"]:
    """Sum the evidences of every block, tapered."""

    def pool(point):
        index, present = locality.index[point], locality.present[point]
        return evidence[:, index] @ jnp.where(present, locality.taper(point, index), 0.0)

    return over_points(pool, evidence.shape[1]).T


def white_noise(key: Key, num: int, variance: Numbers) -> Float[Array, "num points"]:
    """Draw noise for ``num`` members whose mean is zero and whose variance is exactly the one asked for."""
    noise = jax.random.normal(key, (num, variance.size), variance.dtype)
    noise = noise - noise.mean(0)
    noise = noise * jnp.sqrt((num - 1) / jnp.sum(noise**2, axis=0))
    return noise * jnp.sqrt(variance)
