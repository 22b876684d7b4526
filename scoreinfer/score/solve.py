"""A few steps of conjugate gradients for an operator that should be positive definite and may not be."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_RESIDUAL = 0.5
"""Share of the right side that may be left unsolved. Chosen by judgement."""
Vector = Float[Array, " obs"]


def conjugate_gradients(
    operator: Callable[[Vector], Vector], right: Vector, diagonal: Vector, num_steps: int
) -> Vector:
    """Solve operator(w) = right approximately; return right / diagonal where that fails.

    Steps end at the first direction of negative curvature, as in truncated Newton methods. The solution is checked: its
    true residual must be below `LARGEST_RESIDUAL` of the right side.

    Args:
        operator: a symmetric operator.
        right: the right side.
        diagonal: a positive diagonal that stands for the operator where it is no good.
        num_steps: most steps.

    Exactness: consistent as the number of steps grows, for a positive definite operator.

    References: Steihaug 1983, SIAM Journal on Numerical Analysis 20(3).

    >>> float(conjugate_gradients(lambda v: 2 * v, jnp.array([4.0]), jnp.ones(1), 3)[0])
    2.0
    >>> float(conjugate_gradients(lambda v: -2 * v, jnp.array([4.0]), jnp.ones(1), 3)[0])
    4.0
    """

    def step(carry: tuple[Vector, Vector, Vector, Array], _: None) -> tuple[tuple[Vector, Vector, Vector, Array], None]:
        w, residual, direction, going = carry
        moved, square = operator(direction), residual @ residual
        curvature = direction @ moved
        going = going & (curvature > 0) & (square > 0)
        size = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        left = residual - size * moved
        again = left + jnp.where(going, left @ left / jnp.where(going, square, 1.0), 0.0) * direction
        return (w + size * direction, left, jnp.where(going, again, direction), going), None

    start = (jnp.zeros_like(right), right, right, jnp.array(True))
    w = jax.lax.scan(step, start, None, length=num_steps)[0][0]
    solved = jnp.linalg.norm(operator(w) - right) <= LARGEST_RESIDUAL * jnp.linalg.norm(right)
    return jnp.where(solved, w, right / diagonal)
