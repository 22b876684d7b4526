"""Running a model with its observed sites opened and its latent sites given."""

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
from scoreinfer._typing import Key
from scoreinfer.errors import UnsupportedModel

Trace = dict[str, dict[str, Any]]

Given = Mapping[str, Any]  # NumPy arrays too: constants must not become tracers

LOG_DET = "__log_det"


@dataclass
class Notes:
    """What happened while a model ran, besides its sites."""

    improper: list[str] = field(default_factory=list)
    draws_keys: bool = False


class Open(Messenger):
    """Sample the observed sites instead, inside control flow too; give improper sites a value.

    ``numpyro.handlers.uncondition`` does not reach into ``scan``, and opens factors too.

    Args:
        fn: the model.
        names: sites to open (None: every observed site, but no factor).
        shapes: shapes of observations that are broader than their distribution, to which it is expanded.
        notes: where to leave notes.
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
        """Open one message."""
        if msg["type"] == "control_flow":
            self._enter(msg)
        elif msg["type"] == "prng_key":
            self.notes.draws_keys |= not self._own_key
        elif msg["type"] == "param":
            self._own_key = True  # a callable initial value asks for a key: not part of the simulator
        elif msg["type"] == "sample" and not msg.get("_control_flow_done"):
            self._open(msg)
            if msg["value"] is None and _is_improper(msg["fn"]):
                self.notes.improper.append(msg["name"])
                self._own_key = True
                msg["value"] = _any_value(msg["fn"], numpyro.prng_key())
                self._own_key = False

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Close a ``param``."""
        if msg["type"] == "param":
            self._own_key = False

    def _enter(self, msg: dict[str, Any]) -> None:
        bodies = (1, 2) if msg["fn"].__name__ == "cond_wrapper" else (0,)
        inside = functools.partial(Open, names=self.names, shapes=self.shapes, notes=self.notes)
        msg["args"] = tuple(inside(arg) if i in bodies else arg for i, arg in enumerate(msg["args"]))
        if self.names is None or self.names:  # only handlers inside the model have spoken yet: they condition it
            stack = msg["kwargs"]["substitute_stack"]
            msg["kwargs"]["substitute_stack"] = [entry for entry in stack if entry[0] != "condition"]

    def _open(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if is_data(msg) and (self.names is None or name in self.names):
            msg["value"], msg["is_observed"] = None, False
            if name in self.shapes:
                msg["fn"] = msg["fn"].expand(self.shapes[name])


def is_data(site: dict[str, Any]) -> bool:
    """Say whether a site is observed (factors are not)."""
    return site["type"] == "sample" and site["is_observed"] and not site["infer"].get("is_auxiliary")


def layers(fn: dist.Distribution) -> list[dist.Distribution]:
    """List a distribution and what it wraps, from the outside in."""
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
    """Put a latent site's unconstrained point through its bijector, adding the log determinant as a factor.

    The factor is sent from within the site, as NumPyro's potential energy does, so that scale and mask handlers
    act on it in the same way.
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
    """Take the support of one entry."""
    return support.base_constraint if isinstance(support, constraints.independent) else support


def log_prob(site: dict[str, Any], value: Array | None = None) -> Array:
    """Compute the log density of one site, entry by entry, as it counts in the joint (mask and scale included)."""
    log_prob = site["fn"].log_prob(site["value"] if value is None else value)
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def sum_terms(terms: Mapping[str, Array], names: Callable[[str], bool]) -> Float[Array, ""]:
    """Sum the log densities of the sites whose names are asked for."""
    return sum((jnp.sum(term) for name, term in terms.items() if names(name)), start=jnp.zeros(()))


@dataclass(frozen=True, eq=False)
class Script:
    """A model with its arguments, ready to be replayed.

    Args:
        run: the model, closed over its arguments.
        names: its observed sites.
        shapes: see `Open`.
    """

    run: Callable[[], Any]
    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]

    def play(self, key: Key, points: Given | None = None, sites: Given | None = None, notes: Any = None) -> Trace:
        """Run the model with unconstrained latents ``points`` and given ``sites``; draw the rest."""
        model = seed(Open(self.run, self.names, self.shapes, notes), key)
        model = substitute(model, data=jax.tree.map(jnp.asarray, dict(sites or {})))
        model = substitute(model, substitute_fn=functools.partial(_constrained, points or {}))
        return trace(model).get_trace()

    def terms(self, key: Key, points: Given, y: Given) -> dict[str, Array]:
        """Compute the log density of every site, entry by entry."""
        played = self.play(key, points, y)
        return {name: log_prob(site) for name, site in played.items() if site["type"] == "sample"}


def fixed_key() -> Key:
    """Make the one key of all measurements."""
    with jax.ensure_compile_time_eval():  # a constant, also where a problem is made inside jit
        return jax.random.key(20240229)


def compiled(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compile ahead of time: the result runs at once, also where a kernel makes a problem inside jit or vmap.

    (`jax.ensure_compile_time_eval` would do so too, but models must not be traced inside it: their operations
    on constants would run one by one, and equinox's run-time checks would fail.)
    """
    return needs_no_values(functools.partial(ahead_of_time, function), *args)


def ahead_of_time(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compile for arguments of these shapes, and run compiled, where the user has disabled `jit` too."""
    with jax.disable_jit(False):
        program = jax.jit(function).lower(*args).compile()

    def run(*args: Any) -> Any:
        with jax.disable_jit(False):
            return program(*args)

    return run


def needs_no_values(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that traces the model; say what to do where it needs concrete values."""
    try:
        return function(*args)
    except NEEDS_VALUES as error:
        raise UnsupportedModel(
            "this model cannot be read: its structure depends on values, or it takes a Python number from a traced "
            "array. Write branches on sampled values with jnp.where or numpyro's cond, and take sizes from shapes, "
            f"Python integers or NumPy arrays instead of JAX arrays.\n{error}"
        ) from error
