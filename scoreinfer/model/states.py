"""State spaces: a first state, a transition and an observation, and what filters make of them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from scoreinfer._program import RUN_ONCE, Program, shapes_of
from scoreinfer._tree import is_traced
from scoreinfer._typing import Key
from scoreinfer.markov import MarkovModel, State, Time
from scoreinfer.model.entries import bare
from scoreinfer.model.observation import Laws, Measured, ObservedSites, Slots, conclude, measure
from scoreinfer.model.path import check_shape, check_times
from scoreinfer.model.replay import fixed_key, needs_no_values
from scoreinfer.model.survey import NUM_PROBES, in_words
from scoreinfer.process.base import Gaussian

Transition = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class StateSpace:
    """A state-space model: x_0 from ``initial``, then ``transition`` from time to time, seen through ``observation``.

    Args:
        initial: the distribution of the first state, without batch shape; or a function that draws it from a key.
        transition: one of three functions. ``(t0, t1, x) -> distribution`` of the state at ``t1``, whose density guided
            filters and smoothers need. ``(t0, t1, x) -> x`` without noise. ``(key, t0, t1, x) -> x``, any simulator.
        observation: ``(t, x) -> distribution`` of the observation at ``t``, or a dictionary of distributions by site.
        start: time of the first state.

    Exactness: exact: nothing is approximated or discretised here.

    >>> import numpyro.distributions as dist
    >>> space = StateSpace(
    ...     dist.Normal(0.0, 1.0),
    ...     lambda t0, t1, x: dist.Normal(0.9 * x, 0.5),
    ...     lambda t, x: dist.Poisson(jnp.exp(x)),
    ... )
    >>> space.start
    0.0
    """

    initial: dist.Distribution | Callable[[Key], Array]
    transition: Transition
    observation: Callable[[Any, Any], Any]
    start: float | Float[Array, ""] = 0.0


class Series(NamedTuple):
    """A state-space model with the observations to be filtered.

    Args:
        model: the model.
        start: time of the first state.
        ts: times of the observations. The first may be ``start``.
        y: the observations, one vector for each time; NaN where an entry is missing.
    """

    model: MarkovModel
    start: Float[Array, ""]
    ts: Float[Array, " times"]
    y: Float[Array, "times entries"]


def read_space(space: StateSpace, y: Any, ts: Any = None) -> Series:
    """Read a state space and its observations.

    Args:
        space: the state space.
        y: observations, times first; by site where the observation is a dictionary. NaN and masked entries are missing.
        ts: their times; None: ``start`` + 1, 2, ...

    Raises:
        ValueError: if shapes do not fit, times do not increase, or values lie outside of the observation's support.
        TypeError: if a part of the state space is neither a distribution nor a function as it should be.
    """
    start = jnp.asarray(space.start, jnp.result_type(float))
    draw, shape = _initial_of(space.initial)
    transition, log_transition, moments = _transition_of(space.transition, shape, start)
    laws, names = _laws_of(space.observation, shape, start)
    sites = [bare(fn) for fn in abstract(laws, start, jnp.zeros(int(np.prod(shape))))]
    values = _rows(y, names, sites)
    ts = start + jnp.arange(1.0, len(values) + 1) if ts is None else _times(ts, len(values), start)
    observed = read_observed(laws, sites, lambda key: _probes(key, draw, transition, start, ts), ts)
    _check_support(sites, names, values)
    model = MarkovModel(int(np.prod(shape)), shape, draw, transition, observed, log_transition, moments)
    return Series(model, start, ts, values)


def observed_of(space: StateSpace) -> ObservedSites:
    """Measure what the observations of a state space see, at its first 64 times.

    Raises:
        ValueError: as `read_space`.
        TypeError: as `read_space`.
    """
    start = jnp.asarray(space.start, jnp.result_type(float))
    draw, shape = _initial_of(space.initial)
    transition = _transition_of(space.transition, shape, start)[0]
    laws, _ = _laws_of(space.observation, shape, start)
    sites = [bare(fn) for fn in abstract(laws, start, jnp.zeros(int(np.prod(shape))))]
    ts = start + jnp.arange(float(BLOCKS * BLOCK))
    return read_observed(laws, sites, lambda key: _probes(key, draw, transition, start, ts), ts)


def _initial_of(initial: Any) -> tuple[Callable[[Key], State], tuple[int, ...]]:
    if isinstance(initial, dist.Distribution):
        if initial.batch_shape:
            raise ValueError(
                f"`initial` must have no batch shape, got {initial.batch_shape}. Make it one event of the state's "
                f"shape: `initial.to_event({len(initial.batch_shape)})`."
            )
        draw: Callable[[Key], Array] = initial.sample
    elif callable(initial):
        draw = initial
    else:
        raise TypeError(
            f"`initial` must be a NumPyro distribution or a function of a key, got {type(initial).__name__}. Pass the "
            "distribution of the first state, such as `dist.Normal(0.0, 1.0)`."
        )
    shape = jax.eval_shape(draw, fixed_key()).shape
    return lambda key: jnp.ravel(draw(key)).astype(jnp.result_type(float)), shape


def _transition_of(function: Any, shape: tuple[int, ...], t: Time) -> tuple[Any, Any, Any]:
    """Make the draw of a transition, its log density and its moments; None where it has none."""
    number = _num_positional(function)
    if number not in (3, 4):
        raise TypeError(
            f"`transition` must take (t0, t1, x), or (key, t0, t1, x) if it draws random numbers, got a function of "
            f"{number} arguments."
        )
    if number == 4:
        keyed = lambda key, t0, t1, x: function(key, t0, t1, x.reshape(shape))  # noqa: E731
        check_shape(jax.eval_shape(keyed, fixed_key(), t, t, jnp.zeros(shape).ravel()).shape, shape, "transition")
        return lambda key, t0, t1, x: _flat(keyed(key, t0, t1, x)), None, None
    plain = lambda t0, t1, x: function(t0, t1, x.reshape(shape))  # noqa: E731
    told = abstract(plain, t, t, jnp.zeros(int(np.prod(shape))))
    if not isinstance(told, dist.Distribution):
        check_shape(jnp.shape(told), shape, "transition")
        return lambda key, t0, t1, x: _flat(plain(t0, t1, x)), None, None
    check_shape(told.shape(), shape, "transition")
    return (
        lambda key, t0, t1, x: _flat(plain(t0, t1, x).sample(key)),
        lambda t0, t1, x, new: plain(t0, t1, x).log_prob(new.reshape(shape)).sum(),
        _moments_of(plain, told, shape),
    )


def _moments_of(plain: Any, told: dist.Distribution, shape: tuple[int, ...]) -> Any:
    def moments(t0: Time, t1: Time, x: State) -> Gaussian:
        fn = bare(plain(t0, t1, x))
        return Gaussian(_flat(jnp.broadcast_to(fn.mean, shape)), _flat(jnp.broadcast_to(jnp.sqrt(fn.variance), shape)))

    base = bare(told)
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    return moments if isinstance(base, dist.Normal) else None


def _laws_of(observation: Any, shape: tuple[int, ...], t: Time) -> tuple[Laws, tuple[str, ...]]:
    told = abstract(lambda t, x: observation(t, x.reshape(shape)), t, jnp.zeros(int(np.prod(shape))))
    named = told if isinstance(told, Mapping) else {"y": told}
    for name, fn in named.items():
        if not isinstance(fn, dist.Distribution):
            raise TypeError(
                f"`observation` must return a NumPyro distribution, got {type(fn).__name__} for {name!r}. Write "
                "`dist.Normal(x, 0.1)`, say, without `numpyro.sample`."
            )

    def laws(t: Time, x: State) -> tuple[dist.Distribution, ...]:
        told = observation(t, x.reshape(shape))
        return tuple(told.values()) if isinstance(told, Mapping) else (told,)

    return laws, tuple(named)


def read_observed(
    laws: Laws,
    sites: list[dist.Distribution],
    probes: Callable[[Key], Float[Array, "num dim"]],
    ts: Float[Array, " times"],
    slots: Slots | None = None,
) -> ObservedSites:
    """Measure what the entries of an observation see, at `measured_times`.

    Exactness: exact for up to 64 times. Of longer series, entries that see something else at times not measured are
        read wrongly.
    """
    chosen = measured_times(ts)

    def measured(key: Key) -> tuple[Measured, Array]:
        states = probes(key)
        return jax.lax.map(lambda t: measure(laws, key, t, states), chosen), states

    found, states = evaluate(measured, fixed_key())
    seen = conclude(found, sites)
    return ObservedSites(
        seen.kinds, seen.component, laws, seen.moving, jnp.asarray(states[0]), jnp.asarray(found.some_y[0]), slots
    )


def measured_times(ts: Float[Array, " times"]) -> Float[Array, " measured"]:
    """Choose all times, or eight blocks of eight neighbours from the first to the last, if there are more than 64.

    >>> measured_times(jnp.arange(128.0))[6:10].tolist()
    [6.0, 7.0, 17.0, 18.0]
    """
    num = len(ts)
    if num <= BLOCKS * BLOCK:
        return ts
    first = np.linspace(0, num - BLOCK, BLOCKS).astype(int)
    return ts[(first[:, None] + np.arange(BLOCK)).ravel()]


BLOCKS, BLOCK = 8, 8
"""Blocks of neighbouring times at which a long series is measured, and times in each: periods of eight are noticed."""


def evaluate(function: Callable[..., Any], *args: Any) -> Any:
    """Evaluate a function at once, also inside `jit`.

    Arrays that the function closes over, and that have no values yet, are replaced by numbers around one: for functions
    that tell what depends on what.
    """
    program = Program(function, *args)
    constants = [_stand_in(value) if is_traced(value) else value for value in program.constants]
    with jax.ensure_compile_time_eval():
        return jax.device_get(_compiled(program)(constants, *args))


@functools.lru_cache(maxsize=64)
def _compiled(program: Program) -> Callable[..., Any]:
    options: dict[str, Any] = dict(RUN_ONCE)
    return needs_no_values(
        lambda: jax.jit(program).lower(shapes_of(program.constants), *program.shapes).compile(options)
    )


def _stand_in(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), value.shape)
    numbers = np.random.default_rng(0).uniform(0.5, 1.5, value.shape)
    return np.asarray(numbers if jnp.issubdtype(value.dtype, jnp.floating) else np.ones(value.shape), value.dtype)


def spread_out(states: Float[Array, "num dim"], key: Key) -> Float[Array, "num dim"]:
    """Move components that are the same in all states a little, so that they can be told apart."""
    same = (states == states[:1]).all(axis=0)
    noise = 0.1 * (1.0 + jnp.abs(states)) * jax.random.normal(key, states.shape, states.dtype)
    return jnp.where(same, states + noise, states)


def _probes(key: Key, draw: Any, transition: Any, start: Time, ts: Float[Array, " times"]) -> Float[Array, "num dim"]:
    for_draw, for_move, for_spread = jax.random.split(key, 3)
    states = jax.vmap(draw)(jax.random.split(for_draw, NUM_PROBES))
    moved = jax.vmap(lambda key, x: transition(key, start, jnp.maximum(ts[0], start), x))
    later = jax.lax.cond(ts[0] > start, lambda x: moved(jax.random.split(for_move, NUM_PROBES), x), lambda x: x, states)
    return spread_out(jnp.where(jnp.isfinite(later), later, states), for_spread)


def _rows(y: Any, names: tuple[str, ...], sites: list[dist.Distribution]) -> Float[Array, "times entries"]:
    """Put the observed values of all sites side by side, times first."""
    given = y if isinstance(y, Mapping) else {names[0]: y} if len(names) == 1 else {}
    if set(given) != set(names):
        raise ValueError(f"`y` must hold values for {', '.join(names)}, got {', '.join(given) or type(y).__name__}.")
    rows = [_column(name, given[name], fn.shape()) for name, fn in zip(names, sites, strict=True)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"`y` must hold as many times for every site, got {[len(row) for row in rows]}.")
    return jnp.concatenate(rows, axis=1)


def _column(name: str, value: Any, shape: tuple[int, ...]) -> Float[Array, "times entries"]:
    if np.ma.isMaskedArray(value):
        value = np.ma.filled(value.astype(float), np.nan)
    value = jnp.asarray(value, jnp.result_type(float))
    if value.ndim == 0 or value.shape[1:] != shape or not value.shape[0]:
        raise ValueError(
            f"Observations {name!r} must have shape (times, {', '.join(map(str, shape))}) like their distribution at "
            f"one time, got {value.shape}. Put times first, and NaN where an entry is missing."
        )
    return value.reshape(len(value), -1)


def _times(ts: Any, number: int, start: Time) -> Float[Array, " times"]:
    ts = jnp.atleast_1d(jnp.asarray(ts, jnp.result_type(float)))
    if ts.shape != (number,):
        raise ValueError(f"`ts` must hold one time for each of the {number} observations, got shape {ts.shape}.")
    if number > 1:
        check_times(ts, "ts")
    if not is_traced((ts, start)) and ts[0] < start:
        raise ValueError(
            f"The first observation must not come before the first state, at {float(start):g}, got {float(ts[0]):g}. "
            "Set `start=` of the state space."
        )
    return ts


def _check_support(sites: list[dist.Distribution], names: tuple[str, ...], y: Float[Array, "times entries"]) -> None:
    """Refuse values that the observation's distribution cannot have. Traced values are not checked."""
    if is_traced(y):
        return
    with jax.ensure_compile_time_eval():
        values, start = np.asarray(y), 0
    for name, fn in zip(names, sites, strict=True):
        size = int(np.prod(fn.shape()))
        own = values[:, start : start + size]
        start += size
        if is_traced(jax.tree.leaves(fn.support)) or fn.event_dim:
            continue
        inside = np.asarray(fn.support(np.where(np.isnan(own), 0.0, own))) | np.isnan(own)
        if not inside.all():
            raise ValueError(
                f"Observed site {name!r} must lie in the support `{in_words(fn.support)}`, but {np.sum(~inside)} of "
                f"its {inside.size} values do not. Correct the data, or use a distribution that can produce them."
            )


def abstract(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on shapes only, and return what it returned, distributions included."""
    told: list[Any] = []
    jax.eval_shape(lambda *args: told.append(function(*args)), *args)
    return told[0]


def _num_positional(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in found)


def _flat(x: Array) -> State:
    return jnp.ravel(x).astype(jnp.result_type(float))
