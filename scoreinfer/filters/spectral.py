"""Functions of a symmetric matrix, with gradients that exist where eigenvalues coincide."""

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
