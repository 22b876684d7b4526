"""Noising processes with closed-form marginals x_t = scale(t) (x_0 + level(t) e), e ~ N(0, I).

Every one of them is the variance-exploding process seen through a rescaling of space, so the samplers work with
the noise *level* s = noise/scale alone: ``levels(num_steps)`` is all they ask of a process.

References: Song et al. 2021, arXiv 2011.13456, equations 29-33 (VE, VP, sub-VP); Karras et al. 2022,
arXiv 2206.00364, equation 5 (the power-law grid of levels) and table 1 (scale and noise of each process).
"""

import abc

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.process.base import AbstractProcess

Time = Float[Array, ""]


class AbstractNoising(AbstractProcess):
    """A process on t in [0, 1] whose marginals are scale(t) (x_0 + level(t) e)."""

    @abc.abstractmethod
    def log_scale(self, t: Time) -> Time:
        """Compute the logarithm of scale(t)."""

    @abc.abstractmethod
    def level(self, t: Time) -> Time:
        """Compute the noise level s(t), the noise in units of the unscaled draw."""

    def drift(self, t, x):
        """Compute d log scale/dt times ``x``."""
        return jax.grad(self.log_scale)(t) * x

    def diffusion(self, t):
        """Compute scale(t) sqrt(d s^2/dt)."""
        rate = jax.grad(lambda time: self.level(time) ** 2)(t)
        return jnp.exp(self.log_scale(t)) * jnp.sqrt(rate)

    def step(self, t0, t1, x):
        """Compute mean and variance of the transition from ``t0`` to ``t1`` in closed form."""
        scale = jnp.exp(self.log_scale(t1))
        mean = scale * jnp.exp(-self.log_scale(t0)) * x
        return mean, scale**2 * (self.level(t1) ** 2 - self.level(t0) ** 2)

    def levels(self, num_steps: int) -> Float[Array, " levels"]:
        """Compute the increasing grid of noise levels s(0) < ... < s(1) the samplers walk down."""
        return jax.vmap(self.level)(jnp.linspace(0.0, 1.0, num_steps + 1))


class VE(AbstractNoising):
    """Variance exploding: scale 1, levels on a power-law grid from ``level_min`` to ``level_max``.

    Good values: draws standardised to unit variance want ``level_max`` of about 10 (beyond it the marginal is
    Gaussian to the accuracy of the weights) and ``level_min`` a tenth of the sharpest feature.

    >>> [round(float(level), 3) for level in VE(level_min=0.01, level_max=1.0, power=1.0).levels(2)]
    [0.01, 0.505, 1.0]
    """

    level_min: float = 0.002
    level_max: float = 10.0
    power: float = 7.0

    def log_scale(self, t):
        """Compute 0."""
        return jnp.zeros_like(t)

    def level(self, t):
        """Compute the power-law level (Karras et al. 2022, equation 5)."""
        low, high = self.level_min ** (1 / self.power), self.level_max ** (1 / self.power)
        return (low + t * (high - low)) ** self.power


class AbstractLinearRate(AbstractNoising):
    """Scale exp(-integral / 2), the integral being that of a rate beta linear in time."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 1e-4

    def integral(self, t: Time) -> Time:
        """Compute the integral of the rate up to ``t``."""
        t = self.time_min + t * (1 - self.time_min)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def log_scale(self, t):
        """Compute -1/2 the integral of beta."""
        return -0.5 * self.integral(t)


class VP(AbstractLinearRate):
    """Variance preserving: scale^2 + noise^2 = 1."""

    def level(self, t):
        """Compute sqrt(exp(integral of beta) - 1)."""
        return jnp.sqrt(jnp.expm1(self.integral(t)))


class SubVP(AbstractLinearRate):
    """Sub-variance preserving: the scale of `VP`, noise 1 - scale^2 (always below that of `VP`)."""

    def level(self, t):
        """Compute (1 - exp(-integral)) / exp(-integral / 2) = 2 sinh(integral / 2)."""
        return 2.0 * jnp.sinh(0.5 * self.integral(t))
