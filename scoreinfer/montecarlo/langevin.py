"""Metropolis-adjusted Langevin steps of a log density, and what they need: gradients, proposals, acceptance.

With step size e, preconditioner L L^T and standard normal noise n, a step proposes

    x' = x + (e^2 / 2) L L^T grad log p(x) + e L n,

and accepts it with the probability of Metropolis and Hastings.

References: Roberts and Tweedie 1996, Bernoulli 2(4).
"""

import enum
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from scoreinfer._memory import each
from scoreinfer._program import over_devices
from scoreinfer._typing import Key
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import LogWeights

TARGET_ACCEPT_PROB = 0.574
"""The acceptance probability that Langevin steps are tuned to: best in high dimension (Roberts and Rosenthal 1998)."""


LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]
Point = tuple[Any, ...]
"""A point, its log density, its gradient; then whatever else `ValueAndGrad` computes."""
ValueAndGrad = Callable[[Float[Array, " dim"]], tuple[Any, ...]]
"""Computes the log density and its gradient at a point, and possibly more that a step carries along."""
Factor = Float[Array, "dim dim"] | Float[Array, " dim"]
"""A square root L of a covariance L L^T; a vector stands for a diagonal one."""


class Differentiation(enum.Enum):
    """How a log density can be differentiated."""

    REVERSE = "reverse"
    FORWARD = "forward"
    NONE = "none"


def derivatives(log_density: LogDensity, z: Float[Array, " dim"] | jax.ShapeDtypeStruct) -> Differentiation:
    """Find the mode of differentiation that works: reverse, else forward, else none.

    A loop whose length depends on values has forward derivatives alone. A call out of JAX has none.

    Args:
        log_density: the log density; nothing is computed.
        z: its argument, or the shape and dtype of it.
    """
    jax.eval_shape(log_density, z)  # an error of its own is no answer
    for mode in (Differentiation.REVERSE, Differentiation.FORWARD):
        try:
            jax.eval_shape(_BY_MODE[mode](log_density), z)
        except Exception:  # libraries have errors of their own for what they cannot differentiate
            continue
        return mode
    return Differentiation.NONE


def differentiate(
    log_density: LogDensity,
    z: Float[Array, " dim"] | jax.ShapeDtypeStruct,
    forward_mode: bool | None = None,
) -> ValueAndGrad:
    """Make the function that computes a log density and its gradient.

    Where there is no gradient, zero takes its place. Langevin steps are then those of random-walk Metropolis.

    Args:
        log_density: the log density.
        z: its argument, or the shape and dtype of it.
        forward_mode: True: differentiate in forward mode; False: in reverse mode; None: in the mode that works.
    """
    if forward_mode is None:
        return _BY_MODE[derivatives(log_density, z)](log_density)
    return _BY_MODE[Differentiation.FORWARD if forward_mode else Differentiation.REVERSE](log_density)


def _forward(log_density: LogDensity) -> ValueAndGrad:
    def value_and_grad(z: Float[Array, " dim"]) -> tuple[Float[Array, ""], Float[Array, " dim"]]:
        along = lambda direction: jax.jvp(log_density, (z,), (direction,))  # noqa: E731
        return jax.vmap(along, out_axes=(None, 0))(jnp.eye(z.size, dtype=z.dtype))

    return value_and_grad


def _without(log_density: LogDensity) -> ValueAndGrad:
    return lambda z: (log_density(z), jnp.zeros_like(z))


_BY_MODE: dict[Differentiation, Callable[[LogDensity], ValueAndGrad]] = {
    Differentiation.REVERSE: jax.value_and_grad,
    Differentiation.FORWARD: _forward,
    Differentiation.NONE: _without,
}


def colour(factor: Factor, v: Float[Array, " dim"], *, transpose: bool = False) -> Float[Array, " dim"]:
    """Compute L v, or L^T v."""
    if factor.ndim == 1:
        return factor * v
    return factor.T @ v if transpose else factor @ v


def langevin_proposal(
    key: Key, value_and_grad: ValueAndGrad, point: Point, factor: Factor, step_size: Float[Array, ""]
) -> tuple[Point, Float[Array, ""]]:
    """Propose x' = x + e^2/2 L L^T grad + e L noise, and compute its Metropolis-Hastings log ratio.

    Args:
        key: random key.
        value_and_grad: log density (any constant) and its gradient.
        point: where the step starts.
        factor: square root L of the preconditioner.
        step_size: e.

    Returns:
        The proposed point, and the log ratio: minus infinity where the density or its gradient is not finite.

    References: Roberts and Tweedie 1996, Bernoulli 2(4).
    """
    x, value, gradient, *_ = point
    noise = jax.random.normal(key, x.shape, x.dtype)
    drift = 0.5 * step_size * colour(factor, gradient, transpose=True)
    new = x + step_size * colour(factor, drift + noise)
    new_value, new_gradient, *more = value_and_grad(new)
    # In the coordinates v with x = L v, moving back from new to x takes the noise `back`.
    back = -noise - drift - 0.5 * step_size * colour(factor, new_gradient, transpose=True)
    log_ratio = new_value - value + 0.5 * (noise @ noise - back @ back)
    finite = jnp.isfinite(log_ratio) & jnp.isfinite(new_gradient).all()
    return (new, new_value, new_gradient, *more), jnp.where(finite, log_ratio, -jnp.inf)


def metropolis(key: Key, new: PyTree, old: PyTree, log_ratio: Float[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
    """Accept ``new`` with probability min(1, exp(log_ratio)), else keep ``old``; return the probability too."""
    accept = jnp.log(jax.random.uniform(key, (), log_ratio.dtype)) < log_ratio
    return jax.tree.map(partial(jnp.where, accept), new, old), jnp.exp(jnp.minimum(log_ratio, 0.0))


def metropolis_langevin_step(
    key: Key, value_and_grad: ValueAndGrad, point: Point, factor: Factor, step_size: Float[Array, ""]
) -> tuple[Point, Float[Array, ""]]:
    """Take one Metropolis-adjusted Langevin step (see `langevin_proposal`).

    Returns:
        The new point, and the acceptance probability.

    Exactness: exact: leaves the density invariant. A proposal whose density or gradient is not finite is rejected.
    """
    for_noise, for_accept = jax.random.split(key)
    new, log_ratio = langevin_proposal(for_noise, value_and_grad, point, factor, step_size)
    return metropolis(for_accept, new, point, log_ratio)


class Moves(NamedTuple):
    """Mean acceptance probability and the step size of a batch of Langevin moves."""

    accept_prob: Float[Array, ""]
    step_size: Float[Array, ""]


def rejuvenate(
    key: Key,
    log_density: LogDensity,
    values: Float[Array, "draws dim"],
    log_weight: LogWeights,
    num: int,
    num_moves: int = 20,
) -> tuple[Float[Array, "num dim"], Float[Array, " num"], Moves]:
    """Resample ``num`` of the weighted draws, and move the duplicates apart by Langevin steps.

    Args:
        key: random key.
        log_density: the target, up to a constant; a pytree (`jax.tree_util.Partial`) compiles once for all data.
        values: weighted draws.
        log_weight: their log weights.
        num: number of draws to return.
        num_moves: Langevin steps of each draw. Before them, 20 steps of copies that are thrown away find the step size.

    Returns:
        The draws, their log densities, and what the moves did.

    Exactness: the moves leave the target invariant, so the draws are consistent as the weighted draws grow.
    """
    for_rows, for_moves = jax.random.split(key)
    w = np.exp(np.asarray(log_weight, np.float64) - np.nanmax(log_weight))
    w = np.nan_to_num(w) / np.nansum(w)
    z = np.asarray(values, np.float64)
    centred = z - w @ z
    covariance = (centred * w[:, None]).T @ centred
    factor = np.linalg.cholesky(covariance + 1e-8 * np.diag(np.diag(covariance)) + 1e-12 * np.eye(z.shape[1]))
    start = values[resample_indices(for_rows, log_weight, num)]
    return move_all(for_moves, log_density, start, jnp.asarray(factor, values.dtype), num_moves)


@over_devices
def move_all(
    key: Key,
    log_density: LogDensity,
    start: Float[Array, "num dim"],
    factor: Float[Array, "dim dim"],
    num_moves: int,
) -> tuple[Float[Array, "num dim"], Float[Array, " num"], Moves]:
    """Move every row by ``num_moves`` Langevin steps, after tuning their common step size on copies.

    Exactness: leaves the density invariant.
    """
    value_and_grad = differentiate(log_density, start[0])

    def move(carry, key, rate):
        states, log_step = carry
        keys = jax.random.split(key, start.shape[0])
        size = jnp.exp(log_step)
        step = each(lambda key, state: metropolis_langevin_step(key, value_and_grad, state, factor, size), log_density)
        states, accept = step(keys, states)
        return (states, log_step + rate * (accept.mean() - TARGET_ACCEPT_PROB)), accept.mean()

    states = (start, *each(value_and_grad, log_density)(start))
    first = jnp.log(jnp.asarray(1.0 / start.shape[1] ** (1 / 6), start.dtype))
    for_tuning, for_moves = jax.random.split(key)
    (_, log_step), _ = jax.lax.scan(lambda c, k: move(c, k, 1.0), (states, first), jax.random.split(for_tuning, 20))
    (states, _), accept = jax.lax.scan(
        lambda c, k: move(c, k, 0.0), (states, log_step), jax.random.split(for_moves, num_moves)
    )
    return states[0], states[1], Moves(accept.mean(), jnp.exp(log_step))
