"""Critically damped Langevin diffusion: noise acts on a velocity, which moves the position smoothly.

With position x, velocity v, mass m, friction c = 2 sqrt(m) (critical damping) and rate beta(t),

    dx = beta v / m dt,        dv = -beta (x + c v / m) dt + sqrt(2 c beta) dW.

The stationary law is N(0, diag(1, m)). Over a time with integral k = int beta dt, and with r = 1 / sqrt(m) and
z = 2 k r, a transition has the mean and covariance

    E = exp(-k r) (I + k [[r, r^2], [-1, -r]]),
    C_xx = P(3, z),    C_xv = (z^2 / (2 r)) exp(-z),    C_vv = m (P(3, z) + 2 z exp(-z)),

with P the regularised lower incomplete gamma function: 1 - exp(-z) (1 + z + z^2 / 2) without its cancellation.

References: Dockhorn, Vahdat and Kreis 2021, arXiv 2112.07068 (the covariance in another
form).
"""

import jax.numpy as jnp
from jax.scipy.special import gammainc
from jaxtyping import Array, Float

from scoreinfer.process.base import AbstractLinearSDE, LinearGaussian, State, Time


class CriticallyDamped(AbstractLinearSDE):
    """Critically damped Langevin diffusion on t in [0, 1], of states ``(2, dim)``: position and velocity.

    The velocity starts from N(0, start_share mass), so that a start is a position alone (`marginal`).

    Args:
        beta: rate at t = 0.
        growth: what the rate gains from t = 0 to t = 1.
        mass: the mass m.
        start_share: variance of the first velocity, in units of the mass.

    Exactness: exact, at any length of a step.

    Good values: those of Dockhorn et al. 2021, for draws of unit variance.

    >>> damped = CriticallyDamped()
    >>> damped.transition(jnp.array(0.0), jnp.array(9.0)).covariance.diagonal().round(3).tolist()  # stationary
    [1.0, 0.25]
    """

    beta: float = 4.0
    growth: float = 0.0
    mass: float = 0.25
    start_share: float = 0.04

    @property
    def friction(self) -> float:
        """The friction c."""
        return 2.0 * self.mass**0.5

    def integral(self, t: Time) -> Time:
        """Compute the integral of the rate up to ``t``."""
        return self.beta * t + 0.5 * self.growth * t**2

    def marginal(self, t):
        """Compute mean map and covariance given a position; the mean map acts on (position, 0)."""
        mean, (xx, xv, vv) = self._moments(self.integral(t))
        start = self.start_share * self.mass
        moved = start * mean[0, 1] ** 2, start * mean[0, 1] * mean[1, 1], start * mean[1, 1] ** 2
        return LinearGaussian(mean, _factor(xx + moved[0], xv + moved[1], vv + moved[2]))

    def transition(self, t0, t1):
        """Compute the transition from ``t0`` to ``t1``, in closed form."""
        mean, covariance = self._moments(self.integral(t1) - self.integral(t0))
        return LinearGaussian(mean, _factor(*covariance))

    def turned(self, t0: Time, t1: Time) -> LinearGaussian:
        """Compute the transition with reversed velocities: in the stationary law, that of the time reversal."""
        flip = jnp.array([1.0, -1.0])
        mean, factor = self.transition(t0, t1)
        return LinearGaussian(flip[:, None] * mean * flip, flip[:, None] * factor)

    def start(self, x: Float[Array, " dim"]) -> State:
        """Write a position as a state with velocity zero, the mean of a start."""
        return jnp.stack([x, jnp.zeros_like(x)])

    def _moments(self, k: Time) -> tuple[Float[Array, "2 2"], tuple[Array, Array, Array]]:
        """Compute E, and C_xx, C_xv and C_vv, over a time with the integral ``k``."""
        rate = self.mass**-0.5
        z = 2 * k * rate
        fade, gamma = jnp.exp(-z), gammainc(3.0, z)
        mean = jnp.exp(-k * rate) * (jnp.eye(2) + k * jnp.array([[rate, rate**2], [-1.0, -rate]]))
        return mean, (gamma, 0.5 * z**2 / rate * fade, self.mass * (gamma + 2 * z * fade))


def _factor(xx: Array, xv: Array, vv: Array) -> Float[Array, "2 2"]:
    """Compute the Cholesky factor of [[xx, xv], [xv, vv]]; of a covariance of zero it is zero."""
    first = jnp.sqrt(xx)
    lower = xv / jnp.where(xx > 0, first, 1.0)
    return jnp.array([[first, 0.0 * first], [lower, jnp.sqrt(jnp.maximum(vv - lower**2, 0.0))]])
