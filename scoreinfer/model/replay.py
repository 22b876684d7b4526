"""Replay: running a model with given latent values and with its observed sites made sampled."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from scoreinfer._program import NEEDS_VALUES
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import UnsupportedModel

Trace = dict[str, dict[str, Any]]
"""A NumPyro trace: site name to message."""

Given = Mapping[str, Any]
"""Values by site. NumPy arrays are allowed, because constants must not become tracers."""

LOG_DET = "__log_det"
"""Suffix of the factor that holds the log determinant of a latent site's bijector. An internal name."""


@dataclass
class Notes:
    """Further facts about a run of a model.

    Args:
        improper: names of the sites with an improper prior.
        draws_keys: whether the model draws random numbers through ``numpyro.prng_key``.
    """

    improper: list[str] = field(default_factory=list)
    draws_keys: bool = False


class Open(Messenger):
    """A handler that samples the observed sites ("opens" them) and gives a value to sites with an improper prior.

    It also works inside control flow. ``numpyro.handlers.uncondition`` does not work inside ``scan``, and it also
    opens factors.

    Args:
        fn: the model.
        names: sites to open. None means every observed site except factors.
        shapes: batch shapes of sites whose observations are broader than their distribution. The distribution is
            expanded to this shape.
        notes: the object in which facts about the run are recorded. None means a new one.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        names: frozenset[str] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        notes: Notes | None = None,
    ) -> None:
        self.names, self.shapes = names, shapes or {}
        self.notes = Notes() if notes is None else notes
        self._own_key = False
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Process one message."""
        if msg["type"] == "control_flow":
            self._enter(msg)
        elif msg["type"] == "prng_key":
            self.notes.draws_keys |= not self._own_key
        elif msg["type"] == "param":
            self._own_key = True  # the key of a callable initial value is not part of the simulator
        elif msg["type"] == "sample" and not msg.get("_control_flow_done"):
            self._open(msg)
            if msg["value"] is None and _is_improper(msg["fn"]):
                self.notes.improper.append(msg["name"])
                self._own_key = True
                msg["value"] = _any_value(msg["fn"], numpyro.prng_key())
                self._own_key = False

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Note that a ``param`` site is complete."""
        if msg["type"] == "param":
            self._own_key = False

    def _enter(self, msg: dict[str, Any]) -> None:
        bodies = (1, 2) if msg["fn"].__name__ == "cond_wrapper" else (0,)
        inside = functools.partial(Open, names=self.names, shapes=self.shapes, notes=self.notes)
        msg["args"] = tuple(inside(arg) if i in bodies else arg for i, arg in enumerate(msg["args"]))
        if self.names is None or self.names:  # the stack holds only handlers inside the model: drop their conditioning
            stack = msg["kwargs"]["substitute_stack"]
            msg["kwargs"]["substitute_stack"] = [entry for entry in stack if entry[0] != "condition"]

    def _open(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if is_data(msg) and (self.names is None or name in self.names):
            msg["value"], msg["is_observed"] = None, False
            if name in self.shapes:
                msg["fn"] = msg["fn"].expand(self.shapes[name])


def is_data(site: dict[str, Any]) -> bool:
    """Decide whether a site is observed. Factors do not count as observed."""
    return site["type"] == "sample" and site["is_observed"] and not site["infer"].get("is_auxiliary")


def layers(fn: dist.Distribution) -> list[dist.Distribution]:
    """List a distribution and the distributions that it wraps, from the outside in."""
    layers = [fn]
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
        layers.append(fn)
    return layers


def _is_improper(fn: dist.Distribution) -> bool:
    base = layers(fn)[-1]
    while isinstance(base, dist.TransformedDistribution):
        base = layers(base.base_dist)[-1]
    cls, root = type(base), dist.Distribution
    return cls.sample is root.sample and cls.sample_with_intermediates is root.sample_with_intermediates


def _any_value(fn: dist.Distribution, key: Key) -> Array:
    bijector = biject_to(fn.support)
    return bijector(jax.random.uniform(key, bijector.inverse_shape(fn.shape()), minval=-2.0, maxval=2.0))


def _constrained(points: Given, site: dict[str, Any]) -> Array | None:
    """Map a latent site's unconstrained point through its bijector, and add the log determinant as a factor.

    The factor is added inside the site, as in NumPyro's potential energy. So scale and mask handlers also act on it.
    """
    if site["type"] != "sample" or site["name"] not in points:
        return None
    fn, point = site["fn"], points[site["name"]]
    bijector = biject_to(fn.support)
    step = site["infer"].get("_scan_current_index")
    if step is not None and point.ndim > len(bijector.inverse_shape(fn.shape())):
        point = point[step]
    if unwrapped(fn.support) is constraints.real:
        return point
    value = bijector(point)
    log_det = bijector.log_abs_det_jacobian(point, value)
    log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + fn.event_dim)
    numpyro.factor(site["name"] + LOG_DET, log_det)
    return value


def unwrapped(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of one entry."""
    return support.base_constraint if isinstance(support, constraints.independent) else support


def log_prob(site: dict[str, Any], value: Array | None = None) -> Array:
    """Compute the log density of one site, entry by entry, as in the joint density (with mask and scale)."""
    log_prob = site["fn"].log_prob(site["value"] if value is None else value)
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def sum_terms(terms: Mapping[str, Array], names: Callable[[str], bool]) -> Float[Array, ""]:
    """Sum the log densities of the sites for which ``names(name)`` is true."""
    return sum((jnp.sum(term) for name, term in terms.items() if names(name)), start=jnp.zeros(()))


@dataclass(frozen=True, eq=False)
class Script:
    """A model with its arguments.

    Args:
        run: the model as a function without arguments.
        names: names of the observed sites.
        shapes: see `Open`.
        designs: the names of the sites of a design, and a function that draws them. None means that there are none.
    """

    run: Callable[[], Any]
    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    designs: tuple[tuple[str, ...], Callable[[Key], Sites]] | None = None

    def play(self, key: Key, points: Given | None = None, sites: Given | None = None, notes: Any = None) -> Trace:
        """Run the model with unconstrained latent values ``points`` and values ``sites``, and draw all other sites.

        Exactness: sites without a value are exact draws, except sites with an improper prior, which get a value from
            (-2, 2) in the unconstrained space.
        """
        given = dict(sites or {})
        if self.designs is not None and not given.keys() >= set(self.designs[0]):
            for_design, key = jax.random.split(key)
            given = self.designs[1](for_design) | given
        model = seed(Open(self.run, self.names, self.shapes, notes), key)
        model = substitute(model, data=jax.tree.map(jnp.asarray, given))
        model = substitute(model, substitute_fn=functools.partial(_constrained, points or {}))
        return trace(model).get_trace()

    def terms(self, key: Key, points: Given, y: Given) -> dict[str, Array]:
        """Compute the log density of every site, entry by entry."""
        played = self.play(key, points, y)
        return {name: log_prob(site) for name, site in played.items() if site["type"] == "sample"}


def fixed_key() -> Key:
    """Make the random key of all measurements on models."""
    with jax.ensure_compile_time_eval():  # a constant, even if a problem is made inside jit
        return jax.random.key(20240229)


def compiled(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compile a function ahead of time, so that it runs immediately even inside jit or vmap.

    A kernel may make a problem inside jit or vmap. `jax.ensure_compile_time_eval` is no alternative: models traced
    inside it would run their operations on constants one by one, and equinox's run-time checks would fail.

    Raises:
        UnsupportedModel: if tracing needs concrete values.
    """
    return needs_no_values(functools.partial(ahead_of_time, function), *args)


def ahead_of_time(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compile a function for arguments of these shapes, even if the user has disabled `jit`."""
    with jax.disable_jit(False):
        program = jax.jit(function).lower(*args).compile()

    def run(*args: Any) -> Any:
        with jax.disable_jit(False):
            return program(*args)

    return run


def needs_no_values(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that traces the model.

    Raises:
        UnsupportedModel: if tracing needs concrete values.
    """
    try:
        return function(*args)
    except NEEDS_VALUES as error:
        raise UnsupportedModel(
            "this model cannot be read: its structure depends on values, or it converts a traced array to a Python "
            "number. Write branches on sampled values with jnp.where or numpyro's cond. Take sizes from shapes, Python "
            f"integers or NumPy arrays, not from JAX arrays.\n{error}"
        ) from error
