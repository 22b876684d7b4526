"""Dynamics written as terms of diffrax: an `ODETerm`, or a drift and a `ControlTerm` driven by Brownian motion."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key


def from_diffrax(
    terms: diffrax.AbstractTerm, solver: diffrax.AbstractSolver, *, num_steps: int = 1, args: Any = None
) -> Callable[..., Array]:
    """Make the transition of a state space from the terms and the solver of a differential equation.

    Args:
        terms: an ``ODETerm``; or ``MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))`` with a Brownian path. Its
            shape is kept; its key is replaced at every transition.
        solver: a solver of diffrax that fits the terms.
        num_steps: steps of the solver from one time to the next.
        args: the arguments of the vector fields.

    Returns:
        ``(t0, t1, x) -> x`` for an ordinary, ``(key, t0, t1, x) -> x`` for a stochastic differential equation.

    Raises:
        TypeError: if the control is no Brownian path.

    Exactness: consistent as num_steps -> infinity, of the solver's order.

    >>> move = from_diffrax(diffrax.ODETerm(lambda t, x, args: -x), diffrax.Tsit5(), num_steps=4)
    >>> float(move(jnp.array(0.0), jnp.array(1.0), jnp.array(1.0)))
    0.3679
    """

    def solve(terms: diffrax.AbstractTerm, t0: Any, t1: Any, x: Array) -> Array:
        found = diffrax.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            (t1 - t0) / num_steps,
            x,
            args,
            adjoint=diffrax.DirectAdjoint(),  # the only one with gradients along a path that is drawn as it is met
            max_steps=2 * num_steps + 1,
            throw=False,
        )
        assert found.ys is not None
        return found.ys[0]

    drift, noise = drift_and_noise(terms)
    if noise is None:
        return lambda t0, t1, x: solve(terms, t0, t1, x)
    shape = noise.control.shape

    def draw(key: Key, t0: Any, t1: Any, x: Array) -> Array:
        path = diffrax.UnsafeBrownianPath(shape, key, levy_area=noise.control.levy_area)
        return solve(diffrax.MultiTerm(drift, diffrax.ControlTerm(noise.vector_field, path)), t0, t1, x)

    return draw


def drift_and_noise(terms: diffrax.AbstractTerm) -> tuple[diffrax.ODETerm, Any]:
    """Take terms apart.

    Returns:
        The drift; and the noise, None where there is none.

    Raises:
        TypeError: if they are not of the kinds that `from_diffrax` names.
    """
    parts = list(terms.terms) if isinstance(terms, diffrax.MultiTerm) else [terms]
    drifts = [term for term in parts if isinstance(term, diffrax.ODETerm)]
    noises = [term for term in parts if isinstance(term, diffrax.ControlTerm)]
    brownian = all(isinstance(term.control, diffrax.AbstractBrownianPath) for term in noises)
    if len(drifts) != 1 or len(noises) > 1 or len(parts) != len(drifts) + len(noises) or not brownian:
        names = ", ".join(type(term).__name__ for term in parts)
        raise TypeError(
            "Expected an `ODETerm`, or `MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))` with a Brownian path, "
            f"got {names}. Write the drift as one term, and the noise as another."
        )
    return drifts[0], noises[0] if noises else None


def noise_scale(
    noise: Any, ts: Float[Array, " times"], states: Float[Array, "num *state"], args: Any = None
) -> Float[Array, "steps *state"]:
    """Compute sqrt(diag(G G^T) (t_(k+1) - t_k)) of additive noise G dW.

    Args:
        noise: the noise, as `drift_and_noise` returns it.
        ts: the times.
        states: a few states, at which G must be the same.
        args: the arguments of the vector field.

    Raises:
        ValueError: if G depends on the state, or G G^T is not diagonal.
    """
    shape = noise.control.shape.shape
    size = int(np.prod(shape))
    units = jnp.eye(size).reshape(size, *shape)

    def matrix(t: Array, x: Array) -> Float[Array, "noises *state"]:
        return jax.vmap(lambda unit: noise.prod(noise.vector_field(t, x, args), unit))(units)

    found = np.asarray(jax.vmap(lambda t: jax.vmap(lambda x: matrix(t, x))(states))(ts[:-1]))
    columns = found[:, 0].reshape(len(found), size, -1)
    square = np.einsum("tni,tnj->tij", columns, columns)
    mixed = np.abs(square - np.einsum("tii->ti", square)[:, :, None] * np.eye(square.shape[1]))
    if not np.allclose(found, found[:, :1], rtol=1e-5) or (mixed > 1e-5 * np.abs(square).max()).any():
        raise ValueError(
            "Expected noise that is the same at all states and independent between components, got noise that depends "
            "on the state or mixes components. Use a `StateSpace` with `from_diffrax(terms, solver)`."
        )
    amplitude = jnp.sqrt((found[:, 0] ** 2).sum(axis=1))
    steps = jnp.diff(ts).reshape(-1, *[1] * (amplitude.ndim - 1))
    return amplitude * jnp.sqrt(steps)
