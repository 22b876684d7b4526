"""Physics as the forward process, on a grid of times.

    x_{k+1} = Phi_k(x_k) + scale_k e_k,        e_k ~ N(0, I).

Phi_k is one step of the user's simulator, by whatever solver. scale_k is the standard deviation of the simulator's own
noise. Diffusion time is physical time, and no other noise is added. The transition densities are therefore exact.

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
"""A map ``(t0, t1, x)`` of a state between two times."""


class Physics(NamedTuple):
    """Name the site of a NumPyro model that is a physical process, for `scoreinfer.SMDP`.

    Args:
        site: name of an ``EulerMaruyama`` or `PhysicsPath` site.
        reverse: the physics backwards, ``reverse(t0, t1, x)``: from the state ``x`` at ``t1`` to the earlier ``t0``.
            None: minus the drift, x - (Phi(x) - x). The network learns what has to be added, so any map is correct. A
            stable map is learned faster. For strong dissipation the identity is better than an explicit step back. If
            a step is part transport and part dissipation, reverse the transport alone.
        waves: learn in Fourier space, one wavenumber at a time. For fields on periodic grids whose laws are the same
            everywhere. If the physics is linear, regression alone then gives the answer, for a field of any size. If
            it is not, give `SMDP` a `ConvNet` as ``net``.
        separate: whether the network sees the state after the physics backwards (separate updates: first the physics,
            then a learned correction of its result), or the state before it (joint updates). What it corrects is the
            same. Separate updates are better if the physics backwards is good.

    >>> Physics("x").site
    'x'
    """

    site: str
    reverse: Step | None = None
    waves: bool = False
    separate: bool = False


class PhysicsProcess(AbstractProcess):
    """The process x_{k+1} = Phi_k(x_k) + scale_k e_k, for states written as vectors.

    Args:
        ts: the times of the states, increasing.
        scale: standard deviation of the noise of every step, component by component.
        advance: the noise-free step ``(t0, t1, x)``.
        retreat: the physics run backwards, ``(t0, t1, x)`` from ``x`` at ``t1`` to ``t0``.
        shape: shape of one state.
        waves: whether components are the real Fourier coefficients of the state (see `hartley`) or its own entries.
        source: the site of the model that it was read from, if it was.
        given: makes the process for other values of the model's latent sites, on the same grid.
        recipe: makes the process again from its model. The recipe is pickled in place of the process.

    Exactness: exact over whole steps of the grid. Over a part of a step the variance is in proportion to the time.
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

    def flatten(self, states: Float[Array, "..."]) -> Float[Array, "... dim"]:
        """Compute the vectors of components of states. The axes of a state come last."""
        return components_of(states, self.shape, self.waves)

    def unflatten(self, components: Float[Array, "... dim"]) -> Float[Array, "..."]:
        """Compute states from components."""
        return states_of(components, self.shape, self.waves)

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


def minus_drift(advance: Step) -> Step:
    """Make the physics backwards of a step: x - (Phi(x) - x)."""
    return lambda t0, t1, x: 2 * x - advance(t0, t1, x)


def add_noise_stage(process: PhysicsProcess, scale: Float[Array, " dim"]) -> PhysicsProcess:
    """Add one more step, x_{N+1} = x_N + scale e, without drift.

    An observation y of the last state with Gaussian noise is such a step. The reverse process may then start from y
    itself, which is exact: p(x_N | y) is the reverse of this transition.
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


def components_of(states: Float[Array, "..."], shape: tuple[int, ...], waves: bool) -> Float[Array, "..."]:
    """Make one vector of each state: its own components, or its Hartley coefficients."""
    if waves:
        states = hartley(states, len(shape))
    return states.reshape(*states.shape[: states.ndim - len(shape)], -1)


def states_of(components: Float[Array, "..."], shape: tuple[int, ...], waves: bool) -> Float[Array, "..."]:
    """Invert `components_of`."""
    states = components.reshape(*components.shape[:-1], *shape)
    return hartley(states, len(shape)) if waves else states


def hartley(x: Float[Array, "..."], num_axes: int) -> Float[Array, "..."]:
    """Compute the Hartley transform, sum_x f(x) (cos kx + sin kx) / sqrt(n), over the last axes.

    It is a real Fourier transform, orthogonal and its own inverse. If a covariance on a periodic grid is the same
    everywhere, it is diagonal in these coefficients. White noise stays white.

    References: Bracewell 1983, "Discrete Hartley transform", JOSA 73(12).

    >>> x = jnp.arange(4.0)
    >>> [round(float(v), 4) for v in hartley(hartley(x, 1), 1)]
    [0.0, 1.0, 2.0, 3.0]
    """
    axes = tuple(range(-num_axes, 0))
    waves = jnp.fft.fftn(x, axes=axes, norm="ortho")
    return (waves.real - waves.imag).astype(x.dtype)
