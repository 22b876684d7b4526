"""Symmetric positive matrices that couple neighbouring times alone, and their factors.

A matrix with blocks A_k on the diagonal and B_k below it (row k + 1, column k) has the factor L L^T with

    L_kk L_kk^T = A_k - M_(k-1) M_(k-1)^T,        M_k = B_k L_kk^{-T}.

Everything costs as much as the number of times. The precision of a path of a Markov process is such a matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

Path = Float[Array, "times dim"]


class BlockFactor(NamedTuple):
    """The lower factor L of a matrix that couples neighbouring times alone.

    Args:
        diagonal: L_kk, lower triangular.
        below: M_k, block k + 1, k.
    """

    diagonal: Float[Array, "times dim dim"]
    below: Float[Array, "links dim dim"]

    def solve(self, v: Path) -> Path:
        """Compute L^{-1} v."""

        def step(before: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            own, coupling, right = inputs
            found = solve_triangular(own, right - coupling @ before, lower=True)
            return found, found

        below = jnp.concatenate([jnp.zeros_like(self.diagonal[:1]), self.below])
        return jax.lax.scan(step, jnp.zeros_like(v[0]), (self.diagonal, below, v))[1]

    def solve_transposed(self, v: Path) -> Path:
        """Compute L^{-T} v: for standard normal v, a draw of N(0, (L L^T)^{-1})."""

        def step(after: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            own, coupling, right = inputs
            found = solve_triangular(own, right - coupling.T @ after, trans=1, lower=True)
            return found, found

        below = jnp.concatenate([self.below, jnp.zeros_like(self.diagonal[:1])])
        return jax.lax.scan(step, jnp.zeros_like(v[0]), (self.diagonal, below, v), reverse=True)[1]


def factorise(diagonal: Float[Array, "times dim dim"], below: Float[Array, "links dim dim"]) -> BlockFactor:
    """Compute the factor of a positive definite matrix from its blocks.

    >>> eye = jnp.eye(1)[None]
    >>> factor = factorise(jnp.concatenate([eye, 2 * eye]), -eye)  # [[1, -1], [-1, 2]]
    >>> factor.solve_transposed(factor.solve(jnp.array([[0.0], [1.0]]))).ravel().tolist()
    [1.0, 1.0]
    """

    def step(coupling: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        own, following = inputs
        root = jnp.linalg.cholesky(own - coupling @ coupling.T)
        ahead = solve_triangular(root, following.T, lower=True).T
        return ahead, (root, ahead)

    padded = jnp.concatenate([below, jnp.zeros_like(diagonal[:1])])
    _, (roots, ahead) = jax.lax.scan(step, jnp.zeros_like(diagonal[0]), (diagonal, padded))
    return BlockFactor(roots, ahead[:-1])
