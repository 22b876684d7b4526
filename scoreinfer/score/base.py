"""The interface of a score: the denoiser D(x, s, y) = E[x_0 | x_s = x, y] and what follows from it.

With x_s = x_0 + s e, Tweedie's formulas give grad log p(x_s) = (D - x) / s^2 and Cov[x_0 | x_s] = s^2 dD/dx.

References: Efron 2011, "Tweedie's formula and selection bias"; Karras et al. 2022, arXiv 2206.00364, equation 3.
"""

import abc

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

Level = Float[Array, ""]
State = Float[Array, " dim"]


class AbstractScore(eqx.Module):
    """A score at every noise level, by way of its denoiser."""

    @abc.abstractmethod
    def denoise(self, level: Level, x: State, y: PyTree = None) -> State:
        """Compute D = E[x_0 | x_0 + level e = x, y]."""

    def __call__(self, level: Level, x: State, y: PyTree = None) -> State:
        """Compute grad log p(x; level, y)."""
        return (self.denoise(level, x, y) - x) / level**2

    def moments(self, level: Level, x: State, y: PyTree = None) -> tuple[State, State]:
        """Compute mean and marginal variances of x_0 given x_s = x (by default from the denoiser's Jacobian)."""
        mean, jacobian = self.denoise(level, x, y), self.jacobian(level, x, y)
        return mean, level**2 * jacobian.diagonal()

    def jacobian(self, level: Level, x: State, y: PyTree = None) -> Float[Array, "dim dim"]:
        """Compute dD/dx, the posterior covariance of x_0 divided by level^2."""
        return jax.jacfwd(lambda v: self.denoise(level, v, y))(x)
