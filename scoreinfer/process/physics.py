"""Physics as the forward process: a simulator's step as drift, its own noise as diffusion, on a grid of times.

x_{k+1} = Phi_k(x_k) + N(0, diag Q_k). Physical time is diffusion time: nothing is added to the user's simulator, and
its transition densities are known exactly, whatever solver Phi_k stands for.

References: Holzschuh, Vegetti and Thuerey 2023, arXiv 2301.10250, section 2.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._pickling import by_recipe
from scoreinfer._typing import Key, Sites
from scoreinfer.process.base import AbstractProcess, Gaussian

Index = Int[Array, ""] | int
Step = Callable[[Float[Array, ""], Float[Array, ""], Array], Array]
"""A map of states between two times, ``(t0, t1, x)``."""


class Physics(NamedTuple):
    """Name the site of a NumPyro model that is a physical process, for ``fit(..., process=)``.

    Args:
        site: name of an ``EulerMaruyama`` or `PhysicsPath` site.
        reverse: the physics run backwards, ``reverse(t0, t1, x)``: from the state ``x`` at ``t1`` to the earlier
            ``t0``. None: minus the drift, x - (Phi(x) - x). What is learned is added to it, so anything will do, but
            what is stable learns faster: for strong dissipation the identity is better than an explicit step back, and
            of a step that is part transport, part dissipation, the transport alone turned round.
        waves: learn in Fourier space, wavenumber by wavenumber, for fields on periodic grids whose laws are the same
            everywhere. For linear physics regression alone then is the answer, whatever the size of the field; for
            others give `fit` a `ConvNet` as ``net``, which moves fields.
        separate: show the network the state that the physics backwards has led to (separate updates: physics first,
            then the learned correction of its result), not the one it started from (joint updates). What the network
            moves is the same; where the physics backwards is good, its result is nearer to what is to be corrected.

    >>> Physics("x").site
    'x'
    """

    site: str
    reverse: Step | None = None
    waves: bool = False
    separate: bool = False


class PhysicsProcess(AbstractProcess):
    """A process on a time grid, in flat states.

    Args:
        ts: the times of the states, increasing.
        scale: standard deviation of the noise of every step, component by component.
        advance: the noise-free step ``(t0, t1, x)``.
        retreat: the physics run backwards, ``(t0, t1, x)`` from ``x`` at ``t1`` to ``t0``.
        shape: shape of one state.
        waves: components are real Fourier coefficients (an orthogonal change of variables), not the state's own.
        source: the site of a model that it was read from, where it was.
        given: makes the process of other values of the model's latent sites, on the same grid.
        recipe: makes the process again, from its model: what is pickled in its place.
    """

    ts: Float[Array, " times"]
    scale: Float[Array, "steps dim"]
    advance: Step = eqx.field(static=True)
    retreat: Step = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    waves: bool = eqx.field(static=True, default=False)
    source: Physics | None = eqx.field(static=True, default=None)
    given: "Callable[[Sites], PhysicsProcess] | None" = eqx.field(static=True, default=None)
    recipe: "Callable[[], PhysicsProcess] | None" = eqx.field(static=True, default=None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.recipe is None else by_recipe(self.recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PhysicsProcess":
        return self

    def without_steps(self) -> "PhysicsProcess":
        """Copy the process without the model's own functions, which cannot be pickled (see `read_again`)."""
        return dataclasses.replace(self, advance=_left_out, retreat=_left_out, given=None, recipe=None)

    def flatten(self, states: Float[Array, "..."]) -> Float[Array, "... dim"]:
        """Compute components of states, whose axes come last."""
        return flatten(states, self.shape, self.waves)

    def unflatten(self, components: Float[Array, "... dim"]) -> Float[Array, "..."]:
        """Compute states from components."""
        return unflatten(components, self.shape, self.waves)

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return self.scale.shape[0]

    @property
    def dim(self) -> int:
        """Number of components of a state."""
        return self.scale.shape[1]

    def cell(self, t: Float[Array, ""]) -> Int[Array, ""]:
        """Find the step that ``t`` lies in."""
        return jnp.clip(jnp.searchsorted(self.ts, t, side="right") - 1, 0, self.num_steps - 1)

    def forward(self, k: Index, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Compute Phi_k(x), the mean of the next state."""
        return self.advance(self.ts[k], self.ts[k + 1], x)

    def reverse(self, k: Index, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Run the physics of step k backwards from ``x`` at its end."""
        return self.retreat(self.ts[k], self.ts[k + 1], x)

    def drift(self, t, x):
        """Compute the mean velocity (Phi_k(x) - x) / (t_{k+1} - t_k) of the step that ``t`` lies in."""
        k = self.cell(t)
        return (self.forward(k, x) - x) / (self.ts[k + 1] - self.ts[k])

    def diffusion(self, t):
        """Compute the amplitude that gives the step's noise, scale_k / sqrt(t_{k+1} - t_k)."""
        k = self.cell(t)
        return self.scale[k] / jnp.sqrt(self.ts[k + 1] - self.ts[k])

    def step(self, t0, t1, x):
        """Compute N(advance(t0, t1, x), diffusion(t0)^2 (t1 - t0)), over one step of the grid or a part of it."""
        return Gaussian(self.advance(t0, t1, x), self.diffusion(t0) * jnp.sqrt(t1 - t0))

    def simulate(self, key: Key, start: Float[Array, " dim"]) -> Float[Array, "times dim"]:
        """Draw a path from its first state."""

        def step(x, inputs):
            k, key = inputs
            x = self.forward(k, x) + self.scale[k] * jax.random.normal(key, x.shape, x.dtype)
            return x, x

        keys = jax.random.split(key, self.num_steps)
        path = jax.lax.scan(step, start, (jnp.arange(self.num_steps), keys))[1]
        return jnp.concatenate([start[None], path])


def _left_out(t0: Array, t1: Array, x: Array) -> Array:
    raise ValueError("Physics is left out in pickling: run the kernel, which reads it from the model again.")


def minus_drift(advance: Step) -> Step:
    """Make the physics backwards of a step: x - (Phi(x) - x)."""
    return lambda t0, t1, x: 2 * x - advance(t0, t1, x)


def add_noise_stage(process: PhysicsProcess, scale: Float[Array, " dim"]) -> PhysicsProcess:
    """Add one more step without drift, which adds noise: what a Gaussian observation of the last state is.

    Running the reverse process from the observation y itself then is exact: p(x_N | y) is the posterior of one more
    transition, of variance ``scale``^2.
    """
    last, before = process.ts[-1], process.ts[-2]

    def still(move: Step) -> Step:
        def moved(t0: Array, t1: Array, x: Array) -> Array:
            physical = move(jnp.minimum(t0, before), jnp.minimum(t1, last), x)
            return jnp.where(t0 >= last, x, physical)

        return moved

    given = process.given
    return dataclasses.replace(
        process,
        ts=jnp.append(process.ts, 2 * last - before),
        scale=jnp.concatenate([process.scale, scale[None]]),
        advance=still(process.advance),
        retreat=still(process.retreat),
        given=None if given is None else lambda values: add_noise_stage(given(values), scale),
        recipe=None if process.recipe is None else partial(add_noise_stage, process, scale),
    )


def flatten(states: Float[Array, "..."], shape: tuple[int, ...], waves: bool) -> Float[Array, "..."]:
    """Make one vector of each state: its own components, or its Hartley coefficients."""
    if waves:
        states = hartley(states, len(shape))
    return states.reshape(*states.shape[: states.ndim - len(shape)], -1)


def unflatten(components: Float[Array, "..."], shape: tuple[int, ...], waves: bool) -> Float[Array, "..."]:
    """Invert `flatten`."""
    states = components.reshape(*components.shape[:-1], *shape)
    return hartley(states, len(shape)) if waves else states


def hartley(x: Float[Array, "..."], num_axes: int) -> Float[Array, "..."]:
    """Compute the Hartley transform, sum_x f(x) (cos kx + sin kx) / sqrt(n), over the last axes.

    A real Fourier transform that is orthogonal and its own inverse. It makes every covariance that is the same
    everywhere on a periodic grid diagonal, and leaves white noise white.

    References: Bracewell 1983, "Discrete Hartley transform", JOSA 73(12).

    >>> x = jnp.arange(4.0)
    >>> [round(float(v), 4) for v in hartley(hartley(x, 1), 1)]
    [0.0, 1.0, 2.0, 3.0]
    """
    axes = tuple(range(-num_axes, 0))
    waves = jnp.fft.fftn(x, axes=axes, norm="ortho")
    return (waves.real - waves.imag).astype(x.dtype)
