"""PhysicsPath: a NumPyro distribution of paths. Each step is any function plus Gaussian noise."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from scoreinfer._tree import is_traced
from scoreinfer._typing import Key
from scoreinfer.process.terms import drift_and_noise, from_diffrax, noise_scale


class PhysicsPath(dist.Distribution):
    r"""The path x_0 ~ ``init_dist``, x_{k+1} = Phi(t_k, t_{k+1}, x_k) + noise_scale_k e_k on a grid of times.

    The e_k are independent standard normal. Phi is any function that JAX can run: an exact spectral step, Runge-Kutta
    with substeps, a solver of diffrax or exponax, or a learned surrogate. The log density of the path is

        log p_0(x_0) + sum_k log N(x_{k+1}; Phi(t_k, t_{k+1}, x_k), noise_scale_k^2).

    Args:
        step: Phi, as ``(t0, t1, x) -> x`` without noise. It must keep the shape of the state.
        noise_scale: standard deviation of the noise of one step; g sqrt(t_{k+1} - t_k) for dx = ... + g dW. It is
            broadcast to ``(steps, *state)``: one number, one number for each component, or ``(steps, *state)`` if it
            changes in time.
        ts: increasing times of the states, including the first state.
        init_dist: distribution of the first state. It must have no batch shape (``.to_event()`` removes one).
        validate_args: whether NumPyro checks the values given to ``log_prob``. None means NumPyro's setting.

    Raises:
        ValueError: if times do not increase, noise is not positive, or shapes do not fit.
        TypeError: if ``init_dist`` is no NumPyro distribution.

    Exactness: draws and log density of the discrete path are exact.

    >>> decay = lambda t0, t1, x: x * jnp.exp(t0 - t1)
    >>> path = PhysicsPath(decay, 0.1, jnp.linspace(0.0, 1.0, 5), dist.Normal(0.0, 1.0))
    >>> path.sample(jax.random.key(0), (3,)).shape
    (3, 5)
    >>> path.log_prob(jnp.exp(-jnp.linspace(0.0, 1.0, 5)))  # every residual is zero
    Array(4.1157, dtype=float32)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("ts", "noise_scale", "init_dist")
    pytree_aux_fields = ("step",)

    def __init__(
        self,
        step: Callable[[Array, Array, Array], Array],
        noise_scale: Any,
        ts: Any,
        init_dist: Any,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(init_dist, dist.Distribution):
            raise TypeError(
                f"`init_dist` must be a NumPyro distribution, got {type(init_dist).__name__}. "
                "Pass the distribution of the first state, such as `dist.Normal(0.0, 1.0)`."
            )
        if init_dist.batch_shape:
            raise ValueError(
                f"`init_dist` must have no batch shape, got {init_dist.batch_shape}. Make it one event of the state's "
                f"shape: `init_dist.to_event({len(init_dist.batch_shape)})`."
            )
        self.step, self.init_dist = step, init_dist
        self.ts = check_times(ts, "PhysicsPath")
        state = tuple(init_dist.event_shape)
        self.noise_scale = check_noise(noise_scale, (self.ts.shape[0] - 1, *state), "PhysicsPath")
        super().__init__((), (self.ts.shape[0], *state), validate_args=validate_args)

    @classmethod
    def from_diffrax(
        cls, terms: Any, solver: Any, ts: Any, init_dist: Any, *, num_steps: int = 1, args: Any = None
    ) -> "PhysicsPath":
        """Make a path from the terms and the solver of a stochastic differential equation with additive noise.

        A step solves the drift alone, and then adds the noise of the whole step, sqrt(diag(G G^T) (t_(k+1) - t_k)) e.

        Args:
            terms: ``MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))`` of diffrax, with a Brownian path.
            solver: a solver of diffrax for the drift.
            ts: increasing times of the states, including the first state.
            init_dist: distribution of the first state.
            num_steps: steps of the solver from one time to the next.
            args: the arguments of the vector fields.

        Raises:
            ValueError: if there is no noise, or it depends on the state or mixes components.
            TypeError: if the terms are of another kind.

        Exactness: draws and log density of the discrete path are exact. As a solution of the equation it is consistent
            as the times become denser, of weak order one.
        """
        drift, noise = drift_and_noise(terms)
        if noise is None:
            raise ValueError(
                "A path without noise has no density, and these terms are an ordinary differential equation. Add a "
                "`ControlTerm`, or filter a `StateSpace` with `from_diffrax(terms, solver)` as its transition."
            )
        ts = check_times(ts, "PhysicsPath")
        states = init_dist.sample(jax.random.key(0), (2,))
        return cls(
            from_diffrax(drift, solver, num_steps=num_steps, args=args),
            noise_scale(noise, ts, states, args),
            ts,
            init_dist,
        )

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All real numbers."""
        return constraints.independent(constraints.real, self.event_dim)

    def _mean(self, t0: Array, t1: Array, x: Array) -> Array:
        mean = self.step(t0, t1, x)
        check_shape(jnp.shape(mean), jnp.shape(x), "step")
        return mean

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Draw paths. Exactness: exact."""

        def one(key: Key) -> Array:
            for_start, for_noise = jax.random.split(key)
            start = self.init_dist.sample(for_start)
            noise = self.noise_scale * jax.random.normal(for_noise, self.noise_scale.shape, self.noise_scale.dtype)

            def advance(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
                t0, t1, noise = inputs
                x = (self._mean(t0, t1, x) + noise).astype(start.dtype)
                return x, x

            path = jax.lax.scan(advance, start, (self.ts[:-1], self.ts[1:], noise))[1]
            return jnp.concatenate([start[None], path])

        paths = jax.vmap(one)(jax.random.split(key, math.prod(sample_shape)))
        return paths.reshape(*sample_shape, *self.event_shape)

    @validate_sample
    def log_prob(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute the log density of paths."""
        value = jnp.asarray(value)
        leading = jnp.shape(value)[: value.ndim - self.event_dim]

        def one(path: Array) -> Array:
            mean = jax.vmap(self._mean)(self.ts[:-1], self.ts[1:], path[:-1])
            noise = dist.Normal(mean, self.noise_scale).to_event(self.event_dim)
            return self.init_dist.log_prob(path[0]) + noise.log_prob(path[1:])

        return jax.vmap(one)(value.reshape(-1, *self.event_shape)).reshape(leading)


def check_times(ts: Any, who: str) -> Float[Array, " times"]:
    """Check that times are a vector of at least two entries and increase. Traced values are not checked.

    Args:
        ts: the times.
        who: what the times belong to, for the message.

    Raises:
        ValueError: if they do not.
    """
    ts = jnp.asarray(ts, jnp.result_type(float))
    if ts.ndim != 1 or ts.shape[0] < 2:
        raise ValueError(
            f"The times of `{who}` must be a vector of at least two times, got shape {ts.shape}. Pass the times of all "
            "states, including the first."
        )
    if not is_traced(ts):
        with jax.ensure_compile_time_eval():
            times = np.asarray(ts)
        steps = np.diff(times)
        if not (steps > 0).all():
            worst = int(np.argmin(np.where(np.isnan(steps), -np.inf, steps)))
            raise ValueError(
                f"The times of `{who}` must increase, but number {worst} is {times[worst]:g} and the next "
                f"{times[worst + 1]:g}. Sort the times, and remove duplicates."
            )
    return ts


def check_noise(noise_scale: Any, shape: tuple[int, ...], who: str) -> Float[Array, "..."]:
    """Broadcast noise to all steps and components, and check that it is positive. Traced values are not checked.

    Args:
        noise_scale: standard deviation of the noise.
        shape: the shape ``(steps, *state)``.
        who: what the noise belongs to, for the message.

    Raises:
        ValueError: if the noise does not broadcast to ``shape``, or is not positive and finite everywhere.
    """
    noise_scale = jnp.asarray(noise_scale, jnp.result_type(float))
    try:
        full = jnp.broadcast_to(noise_scale, shape)
    except ValueError as error:
        raise ValueError(
            f"`noise_scale` of `{who}` must broadcast to (steps, *state) = {shape}, got {noise_scale.shape}. Pass one "
            "number, one for each component, or one for each step and component."
        ) from error
    if not is_traced(noise_scale):
        with jax.ensure_compile_time_eval():
            bad = ~(np.asarray(noise_scale) > 0) | ~np.isfinite(np.asarray(noise_scale))
        if bad.any():
            raise ValueError(
                f"The noise of `{who}` must be positive and finite everywhere, but {bad.sum()} of its {bad.size} "
                "entries are not. A transition without noise has no density. Remove components without noise from the "
                "state (compute them from the others), or give them a little noise."
            )
    return full


def check_shape(got: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    """Check that a step or drift keeps the shape of the state.

    Args:
        got: the returned shape.
        expected: the shape of the state.
        what: the name of the function, for the message.

    Raises:
        ValueError: if the shapes differ.
    """
    if got != expected:
        raise ValueError(
            f"The physics' {what} must return shape {expected} like the state, got {got}. Remove any batch axis that "
            "the simulator adds."
        )
