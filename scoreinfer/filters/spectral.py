"""Functions of symmetric matrices: roots with gradients where eigenvalues coincide, and those of I + Z Z^T.

Z has N rows and n columns. Both functions of I + Z Z^T are computed from a matrix of N rows or of n, the smaller one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Matrix = Float[Array, "size size"]


@jax.custom_jvp
def inverse_and_root(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Compute B^{-1} and the symmetric B^{-1/2} of a positive definite matrix.

    Exactness: exact up to rounding. The gradient divides differences of the function by those of the eigenvalues, whose
        limit is known where they coincide (Daleckii and Krein 1965); that of eigenvectors does not exist there.

    >>> inverse, root = inverse_and_root(jnp.diag(jnp.array([1.0, 4.0])))
    >>> jnp.diag(inverse).tolist(), jnp.diag(root).tolist()
    ([1.0, 0.25], [1.0, 0.5])
    """
    return _of_spectrum(*jnp.linalg.eigh(matrix))


@inverse_and_root.defjvp
def _(primals, tangents):
    values, vectors = jnp.linalg.eigh(primals[0])
    turned = vectors.T @ tangents[0] @ vectors
    root = jnp.sqrt(values)
    product, total = root[:, None] * root[None], root[:, None] + root[None]
    slopes = -1.0 / product**2, -1.0 / (product * total)
    return _of_spectrum(values, vectors), tuple(vectors @ (slope * turned) @ vectors.T for slope in slopes)


def _of_spectrum(values: Float[Array, " size"], vectors: Matrix) -> tuple[Matrix, Matrix]:
    return (vectors / values) @ vectors.T, (vectors / jnp.sqrt(values)) @ vectors.T


def left_of(z: Float[Array, "num size"], a: Float[Array, " num"]) -> tuple[Float[Array, " size"], Float[Array, ""]]:
    """Compute Z^T (I + Z Z^T)^{-1} a and a^T (I + Z Z^T)^{-1} a.

    Exactness: exact up to rounding.

    >>> weight, left = left_of(jnp.eye(2), jnp.array([1.0, 3.0]))
    >>> weight.tolist(), float(left)
    ([0.5, 1.5], 5.0)
    """
    num, size = z.shape
    if num <= size:
        solved = jax.scipy.linalg.solve(jnp.eye(num, dtype=z.dtype) + z @ z.T, a, assume_a="pos")
        return solved @ z, solved @ a
    row = a @ z
    solved = jax.scipy.linalg.solve(jnp.eye(size, dtype=z.dtype) + z.T @ z, row, assume_a="pos")
    return solved, a @ a - solved @ row


def shrunk(z: Float[Array, "num size"], a: Float[Array, "num *columns"]) -> Float[Array, "num *columns"]:
    """Compute (I + Z Z^T)^{-1/2} A; where n < N as A - Z B^{-1} (I + B^{-1/2})^{-1} Z^T A with B = I + Z^T Z.

    Exactness: exact up to rounding.

    >>> shrunk(jnp.diag(jnp.array([0.0, 3.0**0.5])), jnp.array([1.0, 1.0])).round(3).tolist()
    [1.0, 0.5]
    """
    num, size = z.shape
    if num <= size:
        return inverse_and_root(jnp.eye(num, dtype=z.dtype) + z @ z.T)[1] @ a
    eye = jnp.eye(size, dtype=z.dtype)
    inverse, root = inverse_and_root(eye + z.T @ z)
    return a - z @ (jnp.linalg.solve(eye + root, inverse) @ (z.T @ a))
