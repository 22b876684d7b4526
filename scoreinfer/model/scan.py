"""The body of NumPyro's ``scan`` as a state-space model.

The state at step k is what the body samples there. If the next carry, or the observation, also needs the carry that the
step began with, that carry is a part of the state; it has no noise of its own, and so the transition has no density.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree
from numpyro.handlers import block, seed, substitute, trace
from numpyro.primitives import Messenger

from scoreinfer._program import Program
from scoreinfer._tree import Layout
from scoreinfer._typing import Key
from scoreinfer.errors import Offence, UnsupportedModel
from scoreinfer.markov import MarkovModel, State, Time
from scoreinfer.model.doors import Door, law_of, refuse, whole_paths
from scoreinfer.model.entries import bare
from scoreinfer.model.observation import features_of
from scoreinfer.model.replay import Script, Trace, fixed_key
from scoreinfer.model.states import abstract, read_observed, spread_out
from scoreinfer.model.survey import NUM_PROBES
from scoreinfer.process.base import Gaussian


class Scan(NamedTuple):
    """A scan: its body, first carry, inputs and length, its direction, and the names of the sites of the body."""

    body: Any
    init: Any
    xs: Any
    length: int | None
    reverse: bool
    sites: list[str]


class _Scans(Messenger):
    """A handler that notes every scan of a model. Outside of other handlers it sees the bodies that they make."""

    def __init__(self) -> None:
        self.found: list[Scan] = []
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Note a scan, and the sites that it hands out after it ran."""
        if msg["type"] == "control_flow" and msg["fn"].__name__ == "scan_wrapper":
            body, init, xs, length, reverse = msg["args"]
            self.found.append(Scan(body, init, xs, length, reverse, []))
        elif msg["type"] == "sample" and msg.get("_control_flow_done") and self.found:
            self.found[-1].sites.append(msg["name"])


def play_scans(script: Script, key: Key) -> tuple[Trace, list[Scan]]:
    """Run a model apart from any model around it, and note its scans."""
    scans = _Scans()
    with block(), scans:
        played = script.play(key)
    return played, scans.found


class Steps(NamedTuple):
    """Single steps of a scan.

    Args:
        script: the model.
        number: number of the scan in the model.
        layout: the sampled sites of the body, in one vector.
    """

    script: Script
    number: int
    layout: Layout

    def scan(self, key: Key) -> Scan:
        """Run the model up to the scan, whose first carry may be random."""
        return play_scans(self.script, key)[1][self.number]

    def run(
        self, key: Key, k: Int[Array, ""], carry: PyTree, z: Array | None = None, before: Key | None = None
    ) -> tuple[PyTree, Trace]:
        """Run the body at step k with sampled values ``z``, or draw them; return the next carry, and the sites.

        What the model draws before the scan, by the key ``before``, does not matter to the body.
        """
        scan = self.scan(fixed_key() if before is None else before)
        body = seed(scan.body, key)
        if z is not None:
            body = substitute(body, data=self.layout.unflatten(z))
        with block(), trace() as sites:
            carry, _ = body(carry, jax.tree.map(lambda leaf: jnp.asarray(leaf)[k], scan.xs))
        return carry, sites

    def draw(self, key: Key, k: Int[Array, ""], carry: PyTree) -> Float[Array, " dim"]:
        """Draw what the body samples."""
        return self.values(self.run(key, k, carry)[1])

    def values(self, sites: Trace) -> Float[Array, " dim"]:
        """Put the sampled values in one vector."""
        return self.layout.flatten({name: sites[name]["value"] for name in self.layout.names}).astype(
            jnp.result_type(float)
        )

    def laws(self, k: Int[Array, ""], carry: PyTree, z: Array, names: tuple[str, ...]) -> tuple[dist.Distribution, ...]:
        """Compute the laws of sites of the body."""
        sites = self.run(fixed_key(), k, carry, z)[1]
        return tuple(law_of(name, sites[name]) for name in names)


def scan_door(script: Script, number: int, latents: set[str], data: tuple[str, ...], unknown: tuple[str, ...]) -> Door:
    """Read a scan.

    Args:
        script: the model.
        number: number of the scan in the model.
        latents: the sites of the body that are sampled.
        data: the observed sites, in the body or after the scan.
        unknown: the sites that are drawn before the scan. The first carry may depend on them, but no step.

    Raises:
        UnsupportedModel: if the scan runs backwards, its state is discrete, or its steps have unknown parameters.
    """
    played, scans = abstract(lambda key: play_scans(script, key), fixed_key())
    scan = scans[number]
    names = tuple(name for name in scan.sites if name in latents)
    if scan.reverse:
        raise UnsupportedModel((Offence(names[0], "runs backwards in time (`reverse=True`)", "Scan forwards"),))
    for name in names:
        if not jnp.issubdtype(played[name]["value"].dtype, jnp.floating):
            raise UnsupportedModel((Offence(name, "is a discrete state", "Sum it out, or make it continuous"),))
    layout = Layout(names, tuple(tuple(played[name]["value"].shape[1:]) for name in names))
    length = scan.length if scan.length is not None else len(jax.tree.leaves(scan.xs)[0])
    ts = jnp.arange(length, dtype=jnp.result_type(float))
    steps = Steps(script, number, layout)
    inside = all(name in scan.sites for name in data)
    carried, random = _uses(steps, scan.init, data if inside else ())
    if random:
        refuse(unknown)
    state = _Carried(steps, scan.init) if carried else _Sampled(steps, scan.init)
    if inside:
        laws = lambda t, x: state.laws(_step(t), x, data)  # noqa: E731
        sites = [bare(fn) for fn in abstract(laws, ts[0], jnp.zeros(state.dim))]
        observed, shapes = read_observed(laws, sites, state.probes, ts), tuple((length, *fn.shape()) for fn in sites)
    else:
        site, shape = names[0], layout.shapes[0]
        if len(names) > 1 or carried:
            reason = f"is seen by {', '.join(data)} after the scan, but the state has more parts"
            raise UnsupportedModel((Offence(site, reason, "Observe in the body of the scan"),))
        paths = lambda key: jnp.swapaxes(jax.vmap(state.probes)(jax.random.split(key, length)), 0, 1)  # noqa: E731
        observed, shapes = whole_paths(script, site, data, ts, shape, paths)
    model = MarkovModel(state.dim, state.shape, state.first, state.move, observed, state.log_transition, state.moments)
    return Door(model, ts[0], ts, data, shapes, observed.slots)


def _uses(steps: Steps, init: PyTree, data: tuple[str, ...]) -> tuple[bool, bool]:
    """Say whether the next carry, or the laws of the data, depend on the carry that a step began with.

    Returns:
        That; and whether the step depends on what the model draws before the scan.
    """

    def outputs(carry: PyTree, before: Key, z: Array) -> PyTree:
        following, sites = steps.run(fixed_key(), jnp.zeros((), int), carry, z, before)
        return following, features_of(tuple(law_of(name, sites[name]) for name in data)) if data else ()

    dim = jax.ShapeDtypeStruct((steps.layout.dim,), jnp.result_type(float))
    uses = Program(outputs, _shapes(init), fixed_key(), dim).uses
    return any(uses[:-2]), uses[-2]


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _shapes(tree))


def _step(t: Time) -> Int[Array, ""]:
    return jnp.round(t).astype(int)


class _Sampled:
    """The state is what the body samples: the carry follows from it."""

    def __init__(self, steps: Steps, init: PyTree) -> None:
        self.steps, self.dim = steps, steps.layout.dim
        self.shape = steps.layout.shapes[0] if len(steps.layout.names) == 1 else (self.dim,)
        shapes = _shapes(init)
        self.blank = lambda: _zeros(shapes)
        self.log_transition: Any = self._log_transition
        laws = abstract(self._laws_ahead, jnp.zeros(()), jnp.zeros(()), jnp.zeros(self.dim))
        self.moments: Any = self._moments if all(_is_normal(fn) for fn in laws) else None

    def first(self, key: Key) -> State:
        for_init, for_step = jax.random.split(key)
        return self.steps.draw(for_step, jnp.zeros((), int), self.steps.scan(for_init).init)

    def move(self, key: Key, t0: Time, t1: Time, x: State) -> State:
        return self.steps.draw(key, _step(t1), self.carry(t0, x))

    def carry(self, t: Time, x: State) -> PyTree:
        return self.steps.run(fixed_key(), _step(t), self.blank(), x)[0]

    def laws(self, k: Int[Array, ""], x: State, names: tuple[str, ...]) -> tuple[dist.Distribution, ...]:
        return self.steps.laws(k, self.blank(), x, names)

    def probes(self, key: Key) -> Float[Array, "num dim"]:
        return spread_out(jax.vmap(self.first)(jax.random.split(key, NUM_PROBES)), key)

    def _laws_ahead(self, t0: Time, t1: Time, x: State, new: State | None = None) -> tuple[dist.Distribution, ...]:
        sites = self.steps.run(fixed_key(), _step(t1), self.carry(t0, x), new)[1]
        return tuple(sites[name]["fn"] for name in self.steps.layout.names)

    def _log_transition(self, t0: Time, t1: Time, x: State, new: State) -> Float[Array, ""]:
        values = self.steps.layout.unflatten(new)
        laws = self._laws_ahead(t0, t1, x, new)
        return sum((fn.log_prob(values[n]).sum() for n, fn in zip(values, laws, strict=True)), start=jnp.zeros(()))

    def _moments(self, t0: Time, t1: Time, x: State) -> Gaussian:
        laws = [bare(fn) for fn in self._laws_ahead(t0, t1, x)]
        mean = jnp.concatenate([jnp.ravel(fn.mean) for fn in laws])
        variance = jnp.concatenate([jnp.ravel(fn.variance) for fn in laws])
        return Gaussian(mean, jnp.sqrt(variance))


class _Carried:
    """The state is the carry that the step began with, and what the body samples."""

    def __init__(self, steps: Steps, init: PyTree) -> None:
        flat, self.unravel = ravel_pytree(_zeros(init))
        self.steps, self.size = steps, flat.size
        self.dim = flat.size + steps.layout.dim
        self.shape = (self.dim,)
        self.log_transition = self.moments = None

    def first(self, key: Key) -> State:
        for_init, for_step = jax.random.split(key)
        init = self.steps.scan(for_init).init
        return self._joined(init, self.steps.draw(for_step, jnp.zeros((), int), init))

    def move(self, key: Key, t0: Time, t1: Time, x: State) -> State:
        carry = self.steps.run(fixed_key(), _step(t0), *self._parts(x))[0]
        return self._joined(carry, self.steps.draw(key, _step(t1), carry))

    def laws(self, k: Int[Array, ""], x: State, names: tuple[str, ...]) -> tuple[dist.Distribution, ...]:
        return self.steps.laws(k, *self._parts(x), names)

    def probes(self, key: Key) -> Float[Array, "num dim"]:
        return spread_out(jax.vmap(self.first)(jax.random.split(key, NUM_PROBES)), key)

    def _joined(self, carry: PyTree, z: Array) -> State:
        return jnp.concatenate([ravel_pytree(carry)[0].astype(z.dtype), z])

    def _parts(self, x: State) -> tuple[PyTree, Array]:
        return self.unravel(x[: self.size]), x[self.size :]


def _is_normal(fn: dist.Distribution) -> bool:
    base = bare(fn)
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    return isinstance(base, dist.Normal)
