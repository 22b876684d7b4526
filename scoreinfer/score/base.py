"""Scores: the gradient of the log density of x_s = x_0 + s e, e ~ N(0, I), at every noise level s.

A score is given by its denoiser, D(x, s, y) = E[x_0 | x_s = x, y]. Tweedie's formulas are

    grad log p(x_s | y) = (D - x_s) / s^2,        Cov[x_0 | x_s, y] = s^2 dD/dx.

Here y is what the draw is conditioned on: an observation, or features of it.

References: Efron 2011, "Tweedie's formula and selection bias"; Karras et al. 2022, arXiv 2206.00364, equation 3.
"""

import abc

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

Level = Float[Array, ""]
State = Float[Array, " dim"]


class AbstractScore(eqx.Module):
    """A score at every noise level. A subclass gives the denoiser alone; the rest follows from it."""

    @abc.abstractmethod
    def denoise(self, level: Level, x: State, y: PyTree = None) -> State:
        """Compute D(x, s, y) = E[x_0 | x_s = x, y], s = ``level``."""

    def __call__(self, level: Level, x: State, y: PyTree = None) -> State:
        """Compute the score (D - x) / s^2."""
        return (self.denoise(level, x, y) - x) / level**2

    def moments(self, level: Level, x: State, y: PyTree = None) -> tuple[State, State]:
        """Compute E[x_0 | x_s = x, y] and the variance of each component, the diagonal of s^2 dD/dx."""
        mean, jacobian = self.denoise(level, x, y), self.jacobian(level, x, y)
        return mean, level**2 * jacobian.diagonal()

    def jacobian(self, level: Level, x: State, y: PyTree = None) -> Float[Array, "dim dim"]:
        """Compute dD/dx = Cov[x_0 | x_s = x, y] / s^2."""
        return jax.jacfwd(lambda v: self.denoise(level, v, y))(x)
