"""Reading a series from a NumPyro model: a path as one site, or the body of NumPyro's ``scan``.

Both become a `MarkovModel`. What is observed when is measured: the law of every observed number is computed at paths
that differ at one time only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.handlers import block

from scoreinfer._program import Program, own
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import Offence, UnsupportedModel
from scoreinfer.markov import MarkovModel, Observed, Sees, State, Time
from scoreinfer.model.arguments import bind
from scoreinfer.model.doors import Door, play_apart, refuse, whole_paths
from scoreinfer.model.observation import features_of
from scoreinfer.model.path import PhysicsPath, check_times
from scoreinfer.model.physics import is_process, process_site, transitions
from scoreinfer.model.reading import look, wrong_shape
from scoreinfer.model.replay import Script, Trace, fixed_key
from scoreinfer.model.scan import play_scans, scan_door
from scoreinfer.model.states import Series, StateSpace, abstract, read_space, spread_out
from scoreinfer.model.survey import NUM_PROBES
from scoreinfer.process.base import Gaussian


def read_series(
    model: Callable[..., Any] | StateSpace, site: str | None, args: tuple, kwargs: dict[str, Any]
) -> Series:
    """Read a state space, or a NumPyro model, with its observations.

    Args:
        model: the state space, or the model.
        site: the site of the state; None for a state space.
        args: the arguments: of the model, or of `read_space`.
        kwargs: the keyword arguments.

    Raises:
        TypeError: if a state space is given a site or unknown arguments, or a model no site.
        UnsupportedModel: as `read_model_series`.
        ValueError: as `read_model_series` and `read_space`.
    """
    if isinstance(model, StateSpace) and site is None:
        return read_space(model, *args, **kwargs)
    if isinstance(model, StateSpace) or site is None:
        raise TypeError(
            "Expected the name of the state's site beside a NumPyro model, and no name beside a `StateSpace`, got "
            f"{site!r} beside a {type(model).__name__}."
        )
    return read_model_series(model, site, args, kwargs)


def read_model_series(model: Callable[..., Any], site: str, args: tuple, kwargs: dict[str, Any]) -> Series:
    """Read a NumPyro model with its data.

    Args:
        model: the model.
        site: the site of the state: ``EulerMaruyama``, `PhysicsPath`, or sampled in the body of NumPyro's ``scan``.
        args: the model's arguments, with data. NaN entries are missing; data may end before the times do.
        kwargs: the model's keyword arguments.

    Raises:
        UnsupportedModel: if the site is no process in time, parameters are unknown, or an observation depends on two
            times.
        ValueError: if data are missing or have a wrong shape.
    """
    args, kwargs, _ = bind(model, args, kwargs, None)
    run = functools.partial(model, *jax.tree.map(own, args), **jax.tree.map(own, kwargs))
    with block():  # also inside another model
        program = Program(lambda: look(run, fixed_key()).values)
    values = program(program.constants)
    if not values:
        raise ValueError(
            "`filter` needs data, and this model observes nothing: pass them as the model's arguments, as `y=data`."
        )
    door = find_door(run, site, tuple(values))
    given = [_filled(name, values[name], shape) for name, shape in zip(door.names, door.shapes, strict=True)]
    return Series(door.model, door.start, door.ts, _rows(given, door))


def _rows(given: list[Float[Array, "..."]], door: Door) -> Float[Array, "times entries"]:
    """Sort the observed numbers by the times that they see; NaN where a time has fewer than others."""
    slots = door.slots
    if slots is None:  # one row for each step of a scan
        return jnp.concatenate([value.reshape(door.ts.size, -1) for value in given], axis=1)
    numbers = jnp.concatenate([value.ravel() for value in given])
    return jnp.where(slots.rows < numbers.size, numbers[jnp.minimum(slots.rows, numbers.size - 1)], jnp.nan)


def find_door(run: Callable[[], Any], site: str, data: tuple[str, ...]) -> Door:
    """Find the state-space model in a NumPyro model without arguments.

    Args:
        run: the model.
        site: the site of the state.
        data: names of the observed sites. Those that do not depend on the state are known parameters.
    """
    played, scans = abstract(lambda key: play_scans(Script(run, frozenset(), {}), key), fixed_key())
    if site not in played:
        found = ", ".join(repr(name) for name, row in played.items() if row["type"] == "sample")
        raise UnsupportedModel((Offence(site, f"is no sample site of this model, which has {found}", "Name one"),))
    inside = next((number for number, scan in enumerate(scans) if site in scan.sites), None)
    state = {site} if inside is None else set(scans[inside].sites) - set(data)
    unknown = _unknowns(run, played, state | set(data))
    seen = tuple(name for name in data if _depends(run, name, {site: played[site]["value"]}))
    if not seen:
        reason = f"has no observation: {', '.join(data)} does not depend on it"
        raise UnsupportedModel((Offence(site, reason, "Name the site that the data depend on"),))
    script = Script(run, frozenset(seen), {})
    if inside is not None:
        return scan_door(script, inside, state, seen, unknown)
    refuse(unknown)
    return _path_door(script, site, seen)


def describe(observed: Observed) -> list[str]:
    """Say what the entries of an observation see of the state."""
    counts = {kind: observed.kinds.count(kind) for kind in Sees}
    return [f"{count} of {observed.num} entries: {WORDS[kind]}" for kind, count in counts.items() if count]


WORDS = {
    Sees.COMPONENT: "one component of the state each, with exact scalar likelihoods",
    Sees.LINEAR: "a linear function of several components, with exact scalar likelihoods",
    Sees.NONLINEAR: "a non-linear function of several components, by the ensemble's regression as Kalman filters do",
    Sees.WHOLE: "more than one number each, by particle methods only",
}
"""What entries see."""


def describe_series(run: Callable[[], Any], data: tuple[str, ...]) -> list[str]:
    """Say which sites of a model can be filtered, and what its observations see of them."""
    played, scans = abstract(lambda key: play_scans(Script(run, frozenset(), {}), key), fixed_key())
    paths = [name for name, row in played.items() if row["type"] == "sample" and is_process(row["fn"])]
    states = paths + [name for scan in scans for name in scan.sites[:1] if name not in data]
    lines = []
    for site in states:
        try:
            lines += [f"✓ `filter` {site!r}: {line}" for line in describe(find_door(run, site, data).model.observed)]
        except (UnsupportedModel, ValueError) as error:
            lines.append(f"! no `filter`: {' '.join(str(error).split())}")
    return lines


def _unknowns(run: Callable[[], Any], played: Trace, known: set[str]) -> tuple[str, ...]:
    """Find sites that are random besides the state and the data."""
    values = lambda name: lambda key: play_apart(Script(run, frozenset(), {}), key)[name]["value"]  # noqa: E731
    names = [name for name, row in played.items() if row["type"] == "sample" and name not in known]
    return tuple(name for name in names if any(Program(values(name), fixed_key()).uses))


def _depends(run: Callable[[], Any], name: str, state: Sites) -> bool:
    """Say whether the law of an observed site depends on the state."""
    script = Script(run, frozenset(), {})
    features = lambda state: features_of((play_apart(script, fixed_key(), state)[name]["fn"],))  # noqa: E731
    return any(Program(features, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)).uses)


def _filled(name: str, value: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Broadcast an observation, and put NaN for times that it does not reach."""
    value = jnp.asarray(value, jnp.result_type(float))
    shorter = value.ndim == len(shape) > 0 and value.shape[1:] == shape[1:] and value.shape[0] < shape[0]
    if shorter:
        return jnp.pad(value, [(0, shape[0] - value.shape[0])] + [(0, 0)] * (len(shape) - 1), constant_values=jnp.nan)
    if value.shape not in (shape, ()):
        raise ValueError(wrong_shape(name, shape, value.shape))
    return jnp.broadcast_to(value, shape)


def _path_door(script: Script, site: str, data: tuple[str, ...]) -> Door:
    fn = process_site(site, play_apart(script, fixed_key()))
    ts = check_times(fn.ts if isinstance(fn, PhysicsPath) else fn.t, "filter")
    shape, dim = tuple(fn.init_dist.event_shape), int(np.prod(fn.init_dist.event_shape))
    advance, scale_of = transitions(fn)

    def moments(t0: Time, t1: Time, x: State) -> Gaussian:
        state = x.reshape(shape)
        scale = scale_of(jnp.argmin(jnp.abs(ts[:-1] - t0)), t0, state)
        return Gaussian(jnp.ravel(advance(t0, t1, state)), jnp.broadcast_to(scale, shape).ravel())

    def paths(key: Key) -> Float[Array, "num times dim"]:
        drawn = fn.sample(key, (NUM_PROBES,)).reshape(NUM_PROBES * ts.size, dim)
        return spread_out(drawn, key).reshape(NUM_PROBES, ts.size, dim)

    observed, shapes = whole_paths(script, site, data, ts, shape, paths)
    model = MarkovModel(
        dim,
        shape,
        lambda key: jnp.ravel(fn.init_dist.sample(key)).astype(jnp.result_type(float)),
        lambda key, t0, t1, x: moments(t0, t1, x).sample(key),
        observed,
        lambda t0, t1, x, new: moments(t0, t1, x).log_density(new),
        moments,
        lambda x: fn.init_dist.log_prob(x.reshape(shape)).sum(),
    )
    return Door(model, ts[0], ts, data, shapes, observed.slots)
