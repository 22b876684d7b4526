"""Reading physics: the transitions of a site of a NumPyro model that is a process in time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float
from numpyro.handlers import seed, substitute, trace

from scoreinfer._typing import Key, Sites
from scoreinfer.errors import Offence, UnsupportedModel
from scoreinfer.model.path import PhysicsPath, check_noise, check_shape, check_times
from scoreinfer.model.replay import Open, fixed_key, layers
from scoreinfer.model.survey import NUM_PROBES
from scoreinfer.problem import Problem
from scoreinfer.process import Physics, PhysicsProcess
from scoreinfer.process.physics import Step, components_of, minus_drift, states_of


def read_physics(physics: Physics, model: Callable[..., Any], *args: Any, **kwargs: Any) -> PhysicsProcess:
    """Read the transitions of a model's physical process: mean step, noise, and grid. The state is flattened.

    Args:
        physics: the site, and its reverse step.
        model: the NumPyro model.
        *args: the model's arguments.
        **kwargs: the model's keyword arguments.

    Returns:
        The process, without its initial distribution, which the model's density includes. If the physics has latent
        parameters, the process is that of one draw from their prior; kernels start their training from it. Its
        ``given`` returns the process for other values.

    Raises:
        UnsupportedModel: if the site is missing, is no process in time, has a batch shape, or has noise that depends
            on the state.
        ValueError: if a step or drift has a wrong shape, times do not increase, noise is not positive, a step is not
            finite, or ``waves=True`` is used with noise that differs between components.

    Exactness: mean steps and noise are those of the model. That the noise does not depend on the state is tested on 8
        simulated paths only.
    """
    run = functools.partial(model, *args, **kwargs)

    def site(values: Sites) -> Any:
        played = trace(substitute(seed(Open(run), fixed_key()), data=values)).get_trace()
        return process_site(physics.site, played)

    fn = site({})
    state = tuple(fn.init_dist.event_shape)
    ts = check_times(fn.ts if isinstance(fn, PhysicsPath) else fn.t, "Physics")
    paths = jax.jit(lambda key: fn.sample(key, (NUM_PROBES,)))(jax.random.fold_in(fixed_key(), 1))
    advance, scale_of = transitions(fn)
    scale = _constant_noise(physics.site, scale_of, ts, paths).reshape(len(ts) - 1, -1)
    if physics.waves and not (state and np.allclose(scale, scale[:, :1], rtol=1e-5)):
        raise ValueError(
            "`SMDP(waves=True)` needs a field with the same noise in all components, because the Fourier transform "
            "mixes components. Got a scalar state, or noise that differs. Use `waves=False`, or one noise for all."
        )
    usual = np.asarray(paths).mean(0)[:-1]

    def given(values: Sites) -> PhysicsProcess:
        advance, scale_of = transitions(site(values))
        scales = jax.vmap(scale_of)(jnp.arange(len(usual)), ts[:-1], usual)
        return _process(physics, ts, scales.reshape(len(usual), -1), advance, state)

    recipe = functools.partial(read_physics, physics, model, *args, **kwargs)
    process = dataclasses.replace(_process(physics, ts, scale, advance, state), given=given, recipe=recipe)
    _check_finite(process, process.flatten(paths))
    return process


def is_process(fn: dist.Distribution) -> bool:
    """Say whether a distribution is that of a process in time."""
    return isinstance(layers(fn)[-1], dist.EulerMaruyama | PhysicsPath)


def process_site(name: str, played: dict[str, dict[str, Any]]) -> Any:
    """Return the distribution of a process in time.

    Raises:
        UnsupportedModel: if there is no such site, or it is no process in time or has a batch shape.
    """
    if name not in played or played[name]["type"] != "sample":
        found = ", ".join(repr(key) for key, site in played.items() if site["type"] == "sample")
        raise UnsupportedModel((Offence(name, f"is no sample site of this model, which has {found}", "Name one"),))
    fn = layers(played[name]["fn"])[-1]
    if not is_process(fn):
        way_out = "Make it `numpyro.distributions.EulerMaruyama` or `scoreinfer.PhysicsPath`"
        raise UnsupportedModel((Offence(name, f"is a {type(fn).__name__}, no process in time", way_out),))
    if played[name]["fn"].batch_shape or fn.init_dist.batch_shape:
        reason = f"has batch shape {played[name]['fn'].batch_shape or fn.init_dist.batch_shape}"
        way_out = "Combine several trajectories in one state (`init_dist.to_event()`), or infer each by itself"
        raise UnsupportedModel((Offence(name, reason, way_out),))
    return fn


def _process(
    physics: Physics,
    ts: Float[Array, " times"],
    scale: Float[Array, "steps dim"],
    advance: Step,
    state: tuple[int, ...],
) -> PhysicsProcess:
    reverse = minus_drift(advance) if physics.reverse is None else _checked(physics.reverse, "reverse")
    advance, reverse = (_flat(step, state, physics.waves) for step in (advance, reverse))
    return PhysicsProcess(ts, scale, advance, reverse, state, physics.waves, physics)


def transitions(fn: Any) -> tuple[Step, Callable[[Any, Any, Any], Array]]:
    """Return the step of a path's distribution, and its noise as a function of step number, time and state."""
    if isinstance(fn, PhysicsPath):
        return _checked(fn.step, "step"), lambda k, t, x: fn.noise_scale[k]
    return _euler_step(fn, tuple(fn.init_dist.event_shape))


def _euler_step(fn: dist.EulerMaruyama, state: tuple[int, ...]) -> tuple[Step, Callable[[Any, Any, Any], Array]]:
    steps = jnp.diff(jnp.asarray(fn.t))

    def advance(t0: Array, t1: Array, x: Array) -> Array:
        drift = fn.sde_fn(x, t0)[0]
        check_shape(jnp.shape(drift), jnp.shape(x), "drift")
        return x + (t1 - t0) * drift

    def scale(k: Array, t: Array, x: Array) -> Array:
        return jnp.sqrt(steps[k]) * jnp.broadcast_to(fn.sde_fn(x, t)[1], state)

    return advance, scale


def _checked(step: Step, what: str) -> Step:
    def checked(t0: Array, t1: Array, x: Array) -> Array:
        moved = step(t0, t1, x)
        check_shape(jnp.shape(moved), jnp.shape(x), what)
        return moved

    return checked


def _flat(step: Step, state: tuple[int, ...], waves: bool) -> Step:
    return lambda t0, t1, x: components_of(step(t0, t1, states_of(x, state, waves)), state, waves)


def _constant_noise(
    name: str, scale_of: Callable[[Any, Any, Any], Array], ts: Float[Array, " times"], paths: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Evaluate the noise of every step at several states, and check that it is the same at all of them."""
    steps = jnp.arange(len(ts) - 1)
    scales = jax.jit(jax.vmap(lambda path: jax.vmap(scale_of)(steps, ts[:-1], path[:-1])))(paths)
    scales = np.asarray(scales)
    if not np.allclose(scales, scales[:1], rtol=1e-5):
        raise UnsupportedModel(
            (Offence(name, "has noise that depends on the state", "Transform the state until its noise is additive"),)
        )
    return check_noise(scales[0], scales[0].shape, "Physics")


def _check_finite(process: PhysicsProcess, paths: Float[Array, "num times dim"]) -> None:
    steps = jnp.arange(process.num_steps)
    moved = jax.jit(jax.vmap(lambda path: jax.vmap(process.forward)(steps, path[:-1])))(paths)
    finite = (np.isfinite(moved) & np.isfinite(np.asarray(paths)[:, :-1])).all(axis=(0, 2))
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"The physics' step {first}, from t = {float(process.ts[first]):g}, returns numbers that are not finite "
            f"on paths simulated from the model (first of {np.sum(~finite)} such steps). Use smaller solver steps "
            "(substeps inside `step`), or bound the state."
        )


class NoisyEnd(NamedTuple):
    """A site that observes the last state itself plus Gaussian noise.

    Args:
        site: name of the site.
        scale: standard deviation of the noise of each component.
    """

    site: str
    scale: Float[Array, " dim"]


def noisy_end(site: str, model: Callable[..., Any], *args: Any, **kwargs: Any) -> NoisyEnd | None:
    """Find the observed site that is Normal around the last state of a process.

    Args:
        site: name of the process.
        model: the NumPyro model.
        *args: the model's arguments.
        **kwargs: the model's keyword arguments.

    Returns:
        The site. None means there is no such site.

    Exactness: tested on 8 joint draws: the location of the site equals the last state exactly, and its scale is the
        same in all draws.
    """
    run = functools.partial(model, *args, **kwargs)

    @jax.jit
    @jax.vmap
    def play(key: Key) -> dict[str, tuple[Array, Array, Array]]:
        played = trace(seed(Open(run), key)).get_trace()
        last, found = played[site]["value"][-1], {}
        for name, row in played.items():
            fn = layers(row["fn"])[-1] if row["type"] == "sample" else None
            if isinstance(fn, dist.Normal) and name != site and row["value"].shape == last.shape:
                found[name] = (jnp.broadcast_to(fn.loc, last.shape), jnp.broadcast_to(fn.scale, last.shape), last)
        return found

    draws = play(jax.random.split(fixed_key(), NUM_PROBES))
    for name, (loc, scale, last) in draws.items():
        if np.array_equal(loc, last) and np.array_equal(scale, np.broadcast_to(scale[:1], scale.shape)):
            return NoisyEnd(name, jnp.ravel(scale[0]))
    return None


class Unknowns(NamedTuple):
    """Positions of the path and of the unknown parameters in a latent vector, in the model's order.

    Args:
        before: number of parameters before the path.
        path: length of the path.
        after: number of parameters after the path.
    """

    before: int
    path: int
    after: int

    @property
    def num_parameters(self) -> int:
        """Number of unknown parameters."""
        return self.before + self.after

    def parts(self, z: Float[Array, " dim"]) -> tuple[Float[Array, " parameters"], Float[Array, " path"]]:
        """Split a latent vector into parameters and path."""
        parameters, path, rest = jnp.split(z, (self.before, self.before + self.path))
        return jnp.concatenate([parameters, rest]), path

    def join(self, parameters: Float[Array, " parameters"], path: Float[Array, " path"]) -> Float[Array, " dim"]:
        """Join parameters and path into a latent vector: the inverse of `parts`."""
        return jnp.concatenate([parameters[: self.before], path, parameters[self.before :]])


def unknowns(problem: Problem, site: str) -> Unknowns:
    """Find the path among the latent sites of a problem."""
    sizes = {latent.name: latent.size for latent in problem.latents}
    before = sum(list(sizes.values())[: list(sizes).index(site)])
    return Unknowns(before, sizes[site], problem.dim - before - sizes[site])


def sees_path(problem: Problem, site: str, num_times: int) -> bool:
    """Decide whether the observation depends on states before the last one.

    Args:
        problem: the problem. It must have a simulator.
        site: name of the process.
        num_times: number of states of the path.

    Returns:
        False if the observation depends on the last state and the parameters only.

    Exactness: tested on 8 joint draws. The result is False if the likelihoods stay exactly equal when the earlier
        states are replaced by those of another path. Without a density, any observation counts as dependent.
    """
    assert problem.simulate is not None
    if not problem.has_density:
        return bool(problem.observed)
    found, simulate = unknowns(problem, site), problem.simulate

    @jax.jit
    def compare(keys: Array) -> Bool[Array, ""]:
        z, y = jax.vmap(simulate)(keys)
        parameters, path = jax.vmap(found.parts)(z)
        states = path.reshape(len(keys), num_times, -1)
        swapped = jnp.concatenate([jnp.roll(states[:, :-1], 1, axis=0), states[:, -1:]], axis=1)
        others = jax.vmap(found.join)(parameters, swapped.reshape(len(keys), -1))
        log_likelihood = jax.vmap(problem.log_likelihood)(
            jnp.concatenate([z, others]), jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), y)
        )
        own, theirs = jnp.split(log_likelihood, 2)
        return jnp.array_equal(own, theirs, equal_nan=True)

    return not compare(jax.random.split(fixed_key(), NUM_PROBES))
