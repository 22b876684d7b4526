"""Noising: the linear SDE that turns a draw x_0 into noise, x_t = scale(t) (x_0 + level(t) e), e ~ N(0, I).

The *noise schedule* says how scale and level change with time: `VE`, `Angular`, `VP` or
`SubVP`. The scale is only a change of
units. The samplers therefore work with the noise level s alone, on x_0 + s e, and ask a process for
``levels(num_steps)`` only.

References: Song et al. 2021, arXiv 2011.13456, equations 9, 11 and 12 (VE, VP, sub-VP); Karras et al. 2022,
arXiv 2206.00364, equation 5 (power-law grid of levels), and table 1 (scale and level of each process).
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.process.base import AbstractLinearSDE, LinearGaussian, Time


class AbstractSchedule(eqx.Module):
    """A noise schedule: scale(t) > 0 and an increasing level(t), for t in [0, 1]."""

    @abc.abstractmethod
    def log_scale(self, t: Time) -> Time:
        """Compute log scale(t)."""

    @abc.abstractmethod
    def level(self, t: Time) -> Time:
        """Compute the noise level s(t): the standard deviation of the noise, in the units of x_0."""


class Noising(AbstractLinearSDE):
    """The process x_t = scale(t) (x_0 + level(t) e) on t in [0, 1].

    Args:
        schedule: scale and level.

    >>> noising = Noising(VE(level_min=0.01, level_max=1.0, power=1.0))
    >>> [round(float(level), 3) for level in noising.levels(2)]
    [0.01, 0.505, 1.0]
    """

    schedule: AbstractSchedule

    def marginal(self, t):
        """Compute M = scale(t) and F = scale(t) level(t)."""
        scale = jnp.exp(self.schedule.log_scale(t))
        return LinearGaussian(scale, scale * self.schedule.level(t))

    def levels(self, num_steps: int) -> Float[Array, " levels"]:
        """Compute the levels s(0) < ... < s(1) at ``num_steps + 1`` equally spaced times."""
        return jax.vmap(self.schedule.level)(jnp.linspace(0.0, 1.0, num_steps + 1))


class VE(AbstractSchedule):
    """Variance exploding: scale 1, levels on a power law from ``level_min`` to ``level_max``.

    Good values: for draws of unit variance ``level_max`` of about 10. Noise of level s hides all but 1 / (1 + s^2) of
    the draw's variance; beyond 10, one percent, nothing is seen but a Gaussian. ``level_min`` a tenth of the width of
    the narrowest feature. ``level_min`` = 0.002 and ``power`` = 7 are those of Karras et al. 2022, table 1.
    """

    level_min: float = 0.002
    level_max: float = 10.0
    power: float = 7.0

    def log_scale(self, t):
        """Compute 0."""
        return jnp.zeros_like(t)

    def level(self, t):
        """Compute s(t) = (a + t (b - a))^power, a = level_min^(1/power) and b = level_max^(1/power)."""
        low, high = self.level_min ** (1 / self.power), self.level_max ** (1 / self.power)
        return (low + t * (high - low)) ** self.power


class Angular(AbstractSchedule):
    """Variance exploding: scale 1, levels s = tan(angle), with angles on a power law.

    The probability flow of unit-variance draws turns by this angle from noise to draw (`ProbabilityFlow`). Equal turns
    suit a normal distribution, and small ones at low noise suit narrow features.

    Good values: ``power`` = 2. On two moons four Heun steps reach an ESS/N of .38 with it, .32 with 1.5, .28 with 2.5.

    References: Lu and Song 2024, arXiv 2410.11081, section 3 (TrigFlow).
    """

    level_min: float = 0.002
    level_max: float = 10.0
    power: float = 2.0

    def log_scale(self, t):
        """Compute 0."""
        return jnp.zeros_like(t)

    def level(self, t):
        """Compute s(t) = tan((a + t (b - a))^power), with a and b such that the ends are the two levels."""
        low, high = (math.atan(level) ** (1 / self.power) for level in (self.level_min, self.level_max))
        return jnp.tan((low + t * (high - low)) ** self.power)


class AbstractLinearRate(AbstractSchedule):
    """scale(t) = exp(-I(t) / 2), where I is the integral of a rate beta that grows linearly with time.

    Good values: ``beta_min`` = 0.1 and ``beta_max`` = 20 are those of Song et al. 2021, appendix C. The time starts at
    ``time_min``, since level(0) must be positive: 1e-4 makes it 0.0032 under `VP`, near the 0.002 of `VE`.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 1e-4

    def integral(self, t: Time) -> Time:
        """Compute I = beta_min u + (beta_max - beta_min) u^2 / 2 at u = time_min + t (1 - time_min)."""
        t = self.time_min + t * (1 - self.time_min)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def log_scale(self, t):
        """Compute -I(t) / 2."""
        return -0.5 * self.integral(t)


class VP(AbstractLinearRate):
    """Variance preserving: scale^2 + noise^2 = 1, where noise = scale level."""

    def level(self, t):
        """Compute s(t) = sqrt(exp(I) - 1)."""
        return jnp.sqrt(jnp.expm1(self.integral(t)))


class SubVP(AbstractLinearRate):
    """Sub-variance preserving: the scale of `VP`, and noise = 1 - scale^2, always less than that of `VP`."""

    def level(self, t):
        """Compute s(t) = (1 - exp(-I)) / exp(-I / 2) = 2 sinh(I / 2)."""
        return 2.0 * jnp.sinh(0.5 * self.integral(t))
