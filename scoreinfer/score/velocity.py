"""Velocity scores: grad_v log p_t(x, v) of critically damped Langevin diffusion, in closed form or learned.

Noise acts on the velocity alone, so its reverse-time SDE needs this part of the score only.

References: Dockhorn, Vahdat and Kreis 2021, arXiv 2112.07068 (mixed score).
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.process.langevin import CriticallyDamped

Time = Float[Array, ""]
State = Float[Array, "2 dim"]
Velocity = Float[Array, " dim"]


class AbstractVelocityScore(eqx.Module):
    """The gradient of the log density of position and velocity at time t, by the velocity."""

    @abc.abstractmethod
    def __call__(self, t: Time, u: State) -> Velocity:
        """Compute grad_v log p_t(u)."""


class GaussianVelocity(AbstractVelocityScore):
    """The velocity score of positions N(mean, diag variance).

    Exactness: exact.
    """

    process: CriticallyDamped
    mean: Velocity
    variance: Velocity

    def __call__(self, t, u):
        """Compute minus the velocity's row of the precision, times the distance from the mean."""
        move, noise = self.process.marginal(t)
        fixed = noise @ noise.T
        covariance = fixed[:, :, None] + jnp.outer(move[:, 0], move[:, 0])[:, :, None] * self.variance
        (xx, xv), (_, vv) = covariance
        x, v = u - move @ self.process.start(self.mean)
        return (xv * x - xx * v) / (xx * vv - xv**2)


class NeuralVelocity(AbstractVelocityScore):
    """The score of unit-variance positions plus a network, in the units of the velocity's own noise.

    With L the factor of the covariance given x_0, the score given x_0 is minus the velocity's noise over L_22. The
    network corrects the noise that N(0, I) would have: with an output of zero the score is that of N(0, I).

    Args:
        process: the process.
        network: ``(scaled states, log time, context) -> dim`` numbers.

    Exactness: biased: as good as its training.
    """

    process: CriticallyDamped
    network: Callable[[Array, Array, Array], Array]

    def noise(self, t: Time, u: State) -> Velocity:
        """Compute the expected noise of the velocity, given the state."""
        plain = GaussianVelocity(self.process, jnp.zeros_like(u[0]), jnp.ones_like(u[0]))(t, u)
        scale = jnp.array([1.0, self.process.mass**0.5], u.dtype)[:, None]
        inputs = (u / scale).reshape(-1).astype(jnp.float32)
        correction = self.network(inputs, jnp.log(t + 1e-3).astype(jnp.float32), jnp.zeros(0, jnp.float32))
        return correction - self.process.marginal(t).factor[1, 1] * plain

    def __call__(self, t, u):
        """Compute minus the noise over L_22."""
        return -self.noise(t, u) / self.process.marginal(t).factor[1, 1]
