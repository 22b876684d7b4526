"""Scores: the gradient of the log density of x_s = x_0 + s e, e ~ N(0, I), at every noise level s.

A score is given by its denoiser, D(x, s, y) = E[x_0 | x_s = x, y]. Tweedie's formulas are

    grad log p(x_s | y) = (D - x_s) / s^2,        Cov[x_0 | x_s, y] = s^2 dD/dx.

Here y is what the draw is conditioned on: an observation, or features of it.

References: Efron 2011, "Tweedie's formula and selection bias"; Karras et al. 2022, arXiv 2206.00364, equation 3.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Level = Float[Array, ""]
State = Float[Array, " dim"]


class Moments(NamedTuple):
    """Mean and covariance F F^T of x_0 given x_s.

    Args:
        mean: the denoiser D.
        factor: F; or, where the covariance is taken for diagonal, the standard deviations.
    """

    mean: State
    factor: Float[Array, "dim dim"] | State

    @property
    def covariance(self) -> Float[Array, "dim dim"] | State:
        """The covariance, or its diagonal alone."""
        return self.factor @ self.factor.T if self.factor.ndim == 2 else self.factor**2

    @property
    def variance(self) -> State:
        """The diagonal of the covariance."""
        return (self.factor**2).sum(axis=1) if self.factor.ndim == 2 else self.factor**2


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

    def gaussian(self, level: Level, x: State, y: PyTree = None) -> Moments:
        """Compute D and the whole covariance: the symmetric part of s^2 dD/dx, negative eigenvalues set to zero.

        Exactness: exact for an exact score. The Jacobian of a learned denoiser need not be symmetric or positive.
        """

        def twice(v: State) -> tuple[State, State]:
            denoised = self.denoise(level, v, y)
            return denoised, denoised

        jacobian, mean = jax.jacfwd(twice, has_aux=True)(x)
        return Moments(mean, level * positive_root(jacobian))

    def jacobian(self, level: Level, x: State, y: PyTree = None) -> Float[Array, "dim dim"]:
        """Compute dD/dx = Cov[x_0 | x_s = x, y] / s^2."""
        return jax.jacfwd(lambda v: self.denoise(level, v, y))(x)

    def pull_rows(
        self, level: Level, x: State, rows: Float[Array, "rows dim"], y: PyTree = None
    ) -> Float[Array, "rows dim"]:
        """Compute ``rows`` times dD/dx, by one vector-Jacobian product for each row."""
        pull = jax.vjp(lambda v: self.denoise(level, v, y), x)[1]
        return jax.vmap(lambda row: pull(row)[0])(rows)


@jax.custom_jvp
def positive_root(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """Compute the symmetric square root of the positive part of the symmetric part of a matrix.

    Its derivative is that of a matrix function (Higham 2008, "Functions of Matrices", theorem 3.11), so that equal
    eigenvalues do no harm.

    >>> positive_root(jnp.diag(jnp.array([4.0, -1.0]))).diagonal().tolist()
    [2.0, 0.0]
    """
    return _root(matrix)[0]


@positive_root.defjvp
def _positive_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root, values, vectors = _root(primals[0])
    roots, change = jnp.sqrt(jnp.maximum(values, 0.0)), vectors.T @ _symmetric(tangents[0]) @ vectors
    gap, total = values[:, None] - values, roots[:, None] + roots
    both = (values[:, None] > 0) & (values > 0)
    apart = (roots[:, None] - roots) / jnp.where(gap == 0, 1.0, gap)
    return root, vectors @ (jnp.where(both, 1 / jnp.where(both, total, 1.0), apart) * change) @ vectors.T


def _root(matrix: Float[Array, "dim dim"]) -> tuple[Array, Array, Array]:
    values, vectors = jnp.linalg.eigh(_symmetric(matrix))
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T, values, vectors


def _symmetric(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    return 0.5 * (matrix + matrix.T)
