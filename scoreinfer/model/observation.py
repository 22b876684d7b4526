"""Reading an observation: which numbers of the state its entries see, measured on a few states.

An entry sees one component, if its law changes with that component and with no other. The component is found by its
digits: all components with one binary digit equal to one are changed together, then all others. Of an entry that sees
exactly one component, one of both changes moves the law, for every digit, and these answers spell the component's
number. So d components need 2 log2(d) changes.

An entry that sees several components, through one parameter of its law, sees that parameter, written on the real line
(a rate by its logarithm). Whether this is a linear function of the state is measured too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._typing import Key
from scoreinfer.markov import Entries, Observed, Sees, State, Time
from scoreinfer.model.entries import bare, mask_of, parameters, to_line, with_parameter

Laws = Callable[[Time, State], tuple[dist.Distribution, ...]]
"""The distributions of all observed sites at one time, given the state."""


class Slots(NamedTuple):
    """Where the entries of one time stand among all numbers of the laws.

    Args:
        ts: the times.
        rows: for every time and entry, the number's position; past the end where the entry does not exist.
    """

    ts: Float[Array, " times"]
    rows: Int[Array, "times entries"]


class ObservedSites(Observed):
    """The observed sites of a model as one vector of entries.

    Args:
        kinds: what each entry sees.
        component: the component that each sees, or -1.
        laws: the distributions of the sites.
        moving: the parameter that an entry sees, by site; None where entries see components or more.
        some_state: a state from which the components that entries do not see are taken.
        some_y: an observation, put in place of missing entries.
        slots: where entries stand; None: they are all numbers of all sites, in order.

    Exactness: log likelihoods are the model's own.
    """

    kinds: tuple[Sees, ...] = eqx.field(static=True)
    component: tuple[int, ...] = eqx.field(static=True)
    laws: Laws = eqx.field(static=True)
    moving: tuple[str | None, ...] = eqx.field(static=True)
    some_state: State
    some_y: Float[Array, " numbers"]
    slots: Slots | None = None

    def present(self, t):
        """Say which entries exist at ``t`` and are not masked."""
        mask = self._pick(t, jnp.concatenate([mask_of(fn).ravel() for fn in self.laws(t, self.some_state)]))
        return mask if self.slots is None else mask & (self._rows(t) < self.some_y.size)

    def discrete(self, t):
        """Say which entries are counts, or other numbers that have probabilities."""
        laws = self.laws(t, self.some_state)
        return self._pick(t, jnp.concatenate([jnp.full(np.prod(fn.shape(), dtype=int), fn.is_discrete) for fn in laws]))

    def predict(self, t, x):
        """Take the components; compute the parameters of the other entries."""
        seen = self._components
        taken = x[np.maximum(seen, 0)]
        if (seen >= 0).all():
            return taken
        return jnp.where(seen >= 0, taken, self._pick(t, _numbers(self._laws(t, x), self._parameter)))

    def log_likelihood(self, t, u, y):
        """Compute log p(y_i | u_i) by the laws at states that hold u."""
        spread = self._split(t, y)
        values = self._given(t, u, lambda i, fn: fn.log_prob(_cast(fn, spread[i])))
        return jnp.where(jnp.isnan(y), 0.0, values)

    def mean(self, t, u):
        """Compute the mean of the laws at states that hold u."""
        return self._given(t, u, lambda i, fn: fn.mean)

    def variance(self, t, u):
        """Compute the variance of the laws at states that hold u."""
        return self._given(t, u, lambda i, fn: fn.variance)

    def cdf(self, t, u, y):
        """Compute the distribution function of the laws at states that hold u; NaN where y is missing."""
        spread = self._split(t, y)
        values = self._given(t, u, lambda i, fn: fn.cdf(_cast(fn, spread[i])))
        return jnp.where(jnp.isnan(y), jnp.nan, values)

    def sample(self, key, t, u):
        """Draw from the laws at states that hold u."""
        return self._given(t, u, lambda i, fn: fn.sample(jax.random.fold_in(key, i)))

    def simulate(self, key, t, x):
        """Draw from the laws at the state."""
        return self._pick(t, _numbers(self._laws(t, x), lambda i, fn: fn.sample(jax.random.fold_in(key, i))))

    def log_density(self, t, x, y):
        """Compute the log density of the entries that are not missing."""
        missing, spread = self._scatter(t, jnp.isnan(y), jnp.ones(self.some_y.size, bool)), self._split(t, y)
        total, start = jnp.zeros(()), 0
        for fn, value in zip(self._laws(t, x), spread, strict=True):
            gone = missing[start : start + value.size].reshape(value.shape)
            start += value.size
            gone = gone.any(axis=tuple(range(-fn.event_dim, 0))) if fn.event_dim else gone
            total += jnp.where(gone, 0.0, fn.log_prob(_cast(fn, value))).sum()
        return total

    @property
    def _components(self) -> Int[np.ndarray, " entries"]:
        return np.asarray(self.component)

    def _laws(self, t: Time, x: State) -> list[dist.Distribution]:
        return [bare(fn) for fn in self.laws(t, x)]

    def _parameter(self, i: int, fn: dist.Distribution) -> Array:
        name = self.moving[i]
        if name is None:
            return fn.mean
        return to_line(fn, name).inv(parameters(fn)[name])

    def _given(self, t: Time, u: Entries, of: Callable[[int, dist.Distribution], Array]) -> Entries:
        """Compute a property of every entry's law given u."""
        seen = self._components
        values = jnp.zeros_like(u)
        if (seen >= 0).any():
            values = self._at_components(t, u, of)
        if (seen < 0).any():
            spread = self._scatter(t, u, jnp.zeros(self.some_y.size, u.dtype))
            laws, start = [], 0
            for i, fn in enumerate(self._laws(t, self.some_state)):
                size = int(np.prod(fn.shape()))
                laws.append(self._at_parameter(i, fn, spread[start : start + size].reshape(fn.shape())))
                start += size
            values = jnp.where(seen >= 0, values, self._pick(t, _numbers(laws, of)))
        return values

    def _at_components(self, t: Time, u: Entries, of: Callable[[int, dist.Distribution], Array]) -> Entries:
        """Put u into states. Entries that see the same component need states of their own."""
        seen, turn = self._components, _repeats(self.component)
        where = np.where(seen >= 0, seen, self.some_state.size)
        states = jnp.tile(self.some_state, (int(turn.max()) + 1, 1)).at[turn, where].set(u, mode="drop")
        values = jax.vmap(lambda x: self._pick(t, _numbers(self._laws(t, x), of)))(states)
        return values[turn, np.arange(seen.size)]

    def _at_parameter(self, i: int, fn: dist.Distribution, value: Array) -> dist.Distribution:
        name = self.moving[i]
        return fn if name is None else with_parameter(fn, name, to_line(fn, name)(value))

    def _rows(self, t: Time) -> Int[Array, " entries"]:
        assert self.slots is not None
        return self.slots.rows[jnp.argmin(jnp.abs(self.slots.ts - t))]

    def _pick(self, t: Time, numbers: Array) -> Array:
        return numbers if self.slots is None else numbers[jnp.minimum(self._rows(t), numbers.size - 1)]

    def _scatter(self, t: Time, values: Array, numbers: Array) -> Array:
        return values if self.slots is None else numbers.at[self._rows(t)].set(values, mode="drop")

    def _split(self, t: Time, y: Entries) -> list[Array]:
        """Cut an observation into sites; other numbers stand in place of missing ones."""
        y = self._scatter(t, jnp.where(jnp.isnan(y), self._pick(t, self.some_y), y), self.some_y)
        shapes = [fn.shape() for fn in self.laws(t, self.some_state)]
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(jnp.split(y, ends), shapes, strict=True)]


def _numbers(laws: list[dist.Distribution], of: Callable[[int, dist.Distribution], Array]) -> Array:
    """Compute a property of all laws, one number for each entry."""
    parts = [jnp.broadcast_to(_spread(fn, of(i, fn)), fn.shape()).ravel() for i, fn in enumerate(laws)]
    return jnp.concatenate(parts).astype(jnp.result_type(float))


def _spread(fn: dist.Distribution, value: Array) -> Array:
    """Give one number of a vector's law to all of its entries."""
    return value if jnp.shape(value) == fn.shape() else jnp.reshape(value, fn.batch_shape + (1,) * fn.event_dim)


def _cast(fn: dist.Distribution, value: Array) -> Array:
    return value.astype(int) if fn.is_discrete else value


def _repeats(component: tuple[int, ...]) -> Int[np.ndarray, " entries"]:
    """Count how many earlier entries see the same component."""
    count: dict[int, int] = {}
    turns = []
    for number in component:
        turns.append(count.get(number, 0) if number >= 0 else 0)
        count[number] = turns[-1] + 1
    return np.asarray(turns)


# --- measuring


class Measured(NamedTuple):
    """What was measured on the numbers of all sites, at one time.

    Args:
        digits: for both values of every binary digit, whether a change of such components moves a number's law.
        moves: by site, whether each parameter moves with the state, number by number.
        bent: by site, how far each parameter on the real line is from a linear function of the state.
        some_y: an observation.
    """

    digits: Bool[Array, "*times digits 2 numbers"]
    moves: tuple[dict[str, Array], ...]
    bent: tuple[dict[str, Array], ...]
    some_y: Float[Array, "*times numbers"]


TOLERANCE = 1e-3
"""How far a function on the real line may be from a linear one, relative to its differences between states."""
ROUNDING = 64.0
"""Units of rounding within which two numbers count as equal: one compiled loop may round unlike another."""
SHARE = 0.3
"""Where between two states linearity is measured."""


def measure(laws: Laws, key: Key, t: Time, states: Float[Array, "num dim"]) -> Measured:
    """Measure what the entries see at one time, on a few states that differ in every component."""
    others = jnp.roll(states, 1, axis=0)
    some_y = [fn.sample(jax.random.fold_in(key, i)) for i, fn in enumerate(_bare(laws, t, states[0]))]

    features = lambda x: features_of(laws(t, x))  # noqa: E731
    changed = lambda mask: differ(features, states, jnp.where(mask, others, states))  # noqa: E731
    dim = states.shape[1]
    digit = (np.arange(dim) >> np.arange(max(1, (dim - 1).bit_length()))[:, None]) & 1
    masks = np.stack([digit == 0, digit == 1], axis=1)
    digits = jax.lax.map(changed, jnp.asarray(masks.reshape(-1, dim))).reshape(*masks.shape[:2], -1)
    lines = [jax.vmap(lambda x: _lines(_bare(laws, t, x)))(x) for x in (states, others, _between(states, others))]
    moves = jax.tree.map(lambda a, b: _apart(a, b).any(axis=0).ravel(), *lines[:2])
    return Measured(digits, moves, jax.tree.map(_bent, *lines), jnp.concatenate([jnp.ravel(y) for y in some_y]) * 1.0)


def differ(
    features: Callable[[Array], Float[Array, "features numbers"]],
    a: Float[Array, "num *of"],
    b: Float[Array, "num *of"],
) -> Bool[Array, " numbers"]:
    """Say which numbers have other features at ``a`` than at ``b``, by more than rounding."""
    here, there = jnp.split(jax.vmap(features)(jnp.concatenate([a, b])), 2)
    return _apart(here, there).any(axis=(0, 1))


def _apart(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Say where numbers differ by more than rounding."""
    return ~jnp.isclose(a, b, rtol=ROUNDING * jnp.finfo(a.dtype).eps, atol=0.0, equal_nan=True)


def features_of(laws: tuple[dist.Distribution, ...]) -> Float[Array, "features numbers"]:
    """List numbers that tell laws apart: their parameters, or others where those are unknown."""
    return jnp.concatenate([_padded([jnp.ravel(v) for v in _features(bare(fn))]) for fn in laws], axis=1)


def _features(fn: dist.Distribution) -> list[Array]:
    if fn.event_shape:  # all entries of a vector together
        leaves = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(fn)])
        return [jnp.full(fn.shape(), leaves @ jnp.linspace(0.5, 1.5, leaves.size))]
    known = list(parameters(fn).values())
    return known or [jnp.broadcast_to(fn.log_prob(jnp.ones(())), fn.shape()), jnp.broadcast_to(fn.mean, fn.shape())]


def _bare(laws: Laws, t: Time, x: State) -> list[dist.Distribution]:
    return [bare(fn) for fn in laws(t, x)]


def _padded(rows: list[Array]) -> Array:
    """Stack features of one site; as many rows for all sites."""
    rows = [jnp.asarray(row, jnp.result_type(float)) for row in rows]
    return jnp.stack((rows + [jnp.zeros_like(rows[0])] * MOST_PARAMETERS)[:MOST_PARAMETERS])


MOST_PARAMETERS = 6
"""Parameters of one law, truncation included; no distribution of NumPyro with independent entries has more."""


def _lines(laws: list[dist.Distribution]) -> tuple[dict[str, Array], ...]:
    """Write all parameters on the real line."""
    return tuple(
        {} if fn.event_shape else {name: to_line(fn, name).inv(value * 1.0) for name, value in parameters(fn).items()}
        for fn in laws
    )


def _between(a: Array, b: Array) -> Array:
    return (1 - SHARE) * a + SHARE * b


def _bent(a: Array, b: Array, between: Array) -> Array:
    gap = jnp.abs(between - _between(a, b)).max(axis=0)
    return (gap / (jnp.abs(a - b).max(axis=0) + jnp.finfo(a.dtype).tiny)).ravel()


class Seen(NamedTuple):
    """What every number of the sites sees.

    Args:
        kinds: the kind.
        component: the component, or -1.
        moving: by site, the parameter that moves; None where it is none or more than one.
    """

    kinds: tuple[Sees, ...]
    component: tuple[int, ...]
    moving: tuple[str | None, ...]


def conclude(measured: Measured, sites: list[dist.Distribution]) -> Seen:
    """Decide what every number sees, from measurements at several times (first axis)."""
    digits = np.asarray(measured.digits)
    single = (digits[:, :, 0] != digits[:, :, 1]).all(axis=1)
    number = (digits[:, :, 1] << np.arange(digits.shape[1])[:, None]).sum(axis=1)
    same = single.all(axis=0) & (number == number[:1]).all(axis=0)
    kinds, component, moving, start = [], [], [], 0
    for fn, moves, bent in zip(sites, measured.moves, measured.bent, strict=True):
        own = slice(start, start := start + int(np.prod(fn.shape())))
        alone = same[own] & (not fn.event_shape)
        name, linear = _parameter_seen(moves, bent, ~alone)
        others = (
            [Sees.WHOLE] * alone.size if name is None else [Sees.LINEAR if is_ else Sees.NONLINEAR for is_ in linear]
        )
        kinds += [Sees.COMPONENT if own_ else other for own_, other in zip(alone, others, strict=True)]
        component += np.where(alone, number[0, own], -1).tolist()
        moving.append(name)
    return Seen(tuple(kinds), tuple(component), tuple(moving))


def _parameter_seen(
    moves: dict[str, Any], bent: dict[str, Any], rest: Bool[np.ndarray, " numbers"]
) -> tuple[str | None, Bool[np.ndarray, " numbers"]]:
    """Find the one parameter that moves with the state, for the entries that see no single component."""
    moved: dict[str, np.ndarray] = {name: np.any(value, axis=0) for name, value in moves.items()}
    names = [name for name, value in moved.items() if value[rest].any()]
    if len(names) != 1 or not moved[names[0]][rest].all():
        return None, np.zeros_like(rest)
    return names[0], np.all(np.asarray(bent[names[0]]) < TOLERANCE, axis=0)
