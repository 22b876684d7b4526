"""Observations of whole paths: which number sees which time, and where it stands among the entries of that time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int
from numpyro.handlers import block

from scoreinfer._typing import Key, Sites
from scoreinfer.errors import Offence, UnsupportedModel
from scoreinfer.markov import MarkovModel, Sees
from scoreinfer.model.entries import bare
from scoreinfer.model.observation import ObservedSites, Seen, Slots, differ, features_of
from scoreinfer.model.replay import Script, Trace, fixed_key
from scoreinfer.model.states import abstract, evaluate, read_observed


class Door(NamedTuple):
    """A state-space model as it was found in a NumPyro model.

    Args:
        model: the model on flat vectors.
        start: time of the first state.
        ts: the times.
        names: names of the observed sites.
        shapes: shapes of their values.
        slots: where the numbers of each time stand among all of them. None: a row of the values is a time.
    """

    model: MarkovModel
    start: Float[Array, ""]
    ts: Float[Array, " times"]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    slots: Slots | None = None


def refuse(unknown: tuple[str, ...]) -> None:
    """Refuse sites that are random besides the state and the data.

    Raises:
        UnsupportedModel: if there are any.
    """
    reason, way_out = (
        "is unknown besides the state",
        "Give it a value: `numpyro.handlers.condition(model, {%r: value})`",
    )
    if unknown:
        raise UnsupportedModel(tuple(Offence(name, reason, way_out % name) for name in unknown))


def play_apart(script: Script, key: Key, values: Sites | None = None) -> Trace:
    """Run a model apart from any model around it, and draw what has no value."""
    with block():
        return script.play(key, sites=values)


def law_of(name: str, row: dict[str, Any]) -> dist.Distribution:
    """Return the law of an observed site."""
    if row["scale"] is not None:
        reason = "has a scaled density, whose observation has no law"
        raise UnsupportedModel((Offence(name, reason, "Take `numpyro.handlers.scale` away"),))
    return row["fn"]


def whole_paths(
    script: Script,
    site: str,
    data: tuple[str, ...],
    ts: Float[Array, " times"],
    shape: tuple[int, ...],
    paths: Callable[[Key], Float[Array, "num times dim"]],
) -> tuple[ObservedSites, tuple[tuple[int, ...], ...]]:
    """Read observations of whole paths: the law at one time is that of a path which is there all the time."""

    def laws_of(path: Float[Array, "times dim"]) -> tuple[dist.Distribution, ...]:
        played = play_apart(script, fixed_key(), {site: path.reshape(ts.size, *shape)})
        return tuple(law_of(name, played[name]) for name in data)

    laws = lambda t, x: laws_of(jnp.broadcast_to(x, (ts.size, x.size)))  # noqa: E731
    sees = evaluate(lambda key: _times_seen(laws_of, paths(key)), fixed_key())
    sites = abstract(laws, ts[0], jnp.zeros(int(np.prod(shape))))
    found = read_observed(laws, [bare(fn) for fn in sites], lambda key: paths(key)[:, -1], ts[:1])
    _refuse_two_times(np.asarray(sees), ts, data, sites)
    rows, seen = _places(np.asarray(sees), found)
    slots = Slots(ts, jnp.asarray(rows))
    observed = ObservedSites(seen.kinds, seen.component, laws, seen.moving, found.some_state, found.some_y, slots)
    return observed, tuple(fn.shape() for fn in sites)


def _times_seen(laws_of: Any, paths: Float[Array, "num times dim"]) -> Bool[Array, "times numbers"]:
    """Measure which numbers change their law when the path changes at one time."""
    others = jnp.roll(paths, 1, axis=0)
    features = lambda path: features_of(laws_of(path))  # noqa: E731

    def changed(k: Array) -> Bool[Array, " numbers"]:
        return differ(features, paths, jnp.where((jnp.arange(paths.shape[1]) == k)[:, None], others, paths))

    return jax.lax.map(changed, jnp.arange(paths.shape[1]))


def _refuse_two_times(
    sees: Bool[np.ndarray, "times numbers"], ts: Array, data: tuple[str, ...], sites: tuple[dist.Distribution, ...]
) -> None:
    number = int(np.argmax(sees.sum(axis=0)))
    if sees[:, number].sum() < 2:
        return
    first, second = np.asarray(ts)[np.flatnonzero(sees[:, number])[:2]]
    ends = np.cumsum([int(np.prod(fn.shape())) for fn in sites])
    reason = f"depends on the states at two times, {first:g} and {second:g}"
    way_out = "A filter meets one time after the other: make what it depends on a part of the state"
    raise UnsupportedModel((Offence(data[int(np.searchsorted(ends, number, side="right"))], reason, way_out),))


def _places(
    sees: Bool[np.ndarray, "times numbers"], seen: ObservedSites
) -> tuple[Int[np.ndarray, "times entries"], Seen]:
    """Place numbers among entries, so that entry i sees the same at all times, where that is possible."""
    component = np.asarray(seen.component)
    count: dict[tuple[int, int], int] = {}
    keys = np.empty(component.size, object)
    for k, row in enumerate(sees):
        for number in np.flatnonzero(row):
            what = (k, int(component[number]))
            count[what] = count.get(what, -1) + 1
            keys[number] = (int(component[number]), count[what])
    used = sees.any(axis=0)
    places = {key: place for place, key in enumerate(sorted(set(keys[used])))}
    rows = np.full((len(sees), len(places)), component.size)
    kinds: list[Sees] = [Sees.COMPONENT] * len(places)
    for number in np.flatnonzero(used):
        place = places[keys[number]]
        rows[int(np.argmax(sees[:, number])), place] = number
        kinds[place] = max(kinds[place], seen.kinds[number], key=list(Sees).index)
    return rows, Seen(tuple(kinds), tuple(key[0] for key in places), seen.moving)
