"""Foreign solvers as transitions of a state space: members move outside of JAX, by any executor."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreinfer._typing import Key

Solver = Callable[[float, float, np.ndarray, int], Any]
"""``(t0, t1, state, seed) -> state``, on NumPy arrays."""


def foreign_transition(solver: Solver, *, executor: Executor | None = None) -> Callable[..., Array]:
    """Make the transition of a `scoreinfer.StateSpace` from a program outside of JAX.

    All members of one forecast are handed to the executor together.

    Args:
        solver: ``(t0, t1, state, seed) -> state``. Where it fails it may return NaN: the filter replaces the member and
            counts it. An exception ends the filter.
        executor: any `concurrent.futures.Executor`: threads, or spawned processes (the solver must then be picklable).
            None: one member after the other, in this process.

    Returns:
        ``(key, t0, t1, x) -> x``. It has no density and no gradient: ensemble methods and `BootstrapFilter` can use it.

    Exactness: that of the solver. The same key gives the same seeds, for every executor.

    >>> move = foreign_transition(lambda t0, t1, x, seed: 0.5 * x)
    >>> jax.vmap(move, (0, None, None, 0))(jax.random.split(jax.random.key(0), 3), 0.0, 1.0, jnp.arange(3.0)).tolist()
    [0.0, 0.5, 1.0]
    """

    def rows(t0: Any, t1: Any, x: Any, seed: Any) -> np.ndarray:
        """Run the solver on every row of a batch; the seeds have the batch axes and no others."""
        x, seed = np.asarray(x), np.asarray(seed)
        states = x.reshape(seed.size, *x.shape[seed.ndim :])
        times = [np.broadcast_to(np.asarray(t), seed.shape).ravel().tolist() for t in (t0, t1)]
        run = map if executor is None else executor.map
        moved = [np.asarray(state, x.dtype) for state in run(solver, *times, list(states), seed.ravel().tolist())]
        return np.stack(moved).reshape(x.shape)

    def draw(key: Key, t0: Any, t1: Any, x: Array) -> Array:
        seed = jax.random.bits(key, (), jnp.uint32)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(rows, shape, jnp.asarray(t0), jnp.asarray(t1), x, seed, vmap_method="broadcast_all")

    return draw
