"""Shared parts of NumPyro's kernel interface.

Every call reads the data from the model's arguments. The states hold values by site.
"""

import math
import operator
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree
from numpyro.util import is_prng_key

from scoreinfer._program import digest_array, trace_afresh
from scoreinfer._tree import Layout, evaluated_at_once, is_traced
from scoreinfer._typing import Sites
from scoreinfer.montecarlo.langevin import differentiate
from scoreinfer.problem import Problem
from scoreinfer.training.simulations import blame

NO_START = "Cannot find valid initial parameters: the log density or its gradient is not finite"
"""Beginning of the errors about a start of chains. It begins like NumPyro's own message."""


def observe(problem: Problem, args: tuple, kwargs: dict[str, Any]) -> Sites:
    """Read the observation as arrays without weak types. Known values stay concrete inside a trace.

    Raises:
        ValueError: if the arguments do not fit the problem.
    """
    y = problem.read(args, kwargs)
    with evaluated_at_once():
        return {name: jnp.array(value, jnp.result_type(value)) for name, value in y.items()}


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["mark"])
class Origin:
    """A mark of the data's source. It is part of the state's structure, so a new mark makes JAX trace a loop again."""

    def __init__(self, mark: str):
        self.mark = mark


class Origins:
    """Detects data that change outside the model's arguments, or by an edit of an array in place.

    `MCMC` compiles its loop once for the same argument objects, and the loop keeps the data that it has read.
    """

    def __init__(self) -> None:
        self._digests: dict[int, tuple[weakref.ref, str]] = {}
        self._num_edits = 0
        self._latest: tuple[list[Any], Origin] | None = None

    def begin(self, problem: Problem, args: tuple, kwargs: dict[str, Any], number: int = 0) -> Origin:
        """Record the data and the number of the problem with which a chain begins."""
        origin = self._now(problem, args, kwargs, number)
        self._latest = jax.tree.leaves((args, kwargs)), origin
        return origin

    def check(self, problem: Problem, args: tuple, kwargs: dict[str, Any], number: int = 0) -> None:
        """Check that the data of the same argument objects have not changed since the latest chain began.

        Raises:
            ValueError: if they have changed.
        """
        if self._latest is None or is_traced((args, kwargs)):
            return
        leaves, origin = jax.tree.leaves((args, kwargs)), self._latest[1]
        same = len(leaves) == len(self._latest[0]) and all(map(operator.is_, leaves, self._latest[0]))
        if same and self._now(problem, args, kwargs, number).mark != origin.mark:
            raise ValueError(
                "The data have changed since the warm-up, outside the model's arguments or in place, but the compiled "
                "loop still holds the old data. Warm up again (or run without `post_warmup_state`), or pass the data "
                "as arguments."
            )

    def _now(self, problem: Problem, args: tuple, kwargs: dict[str, Any], number: int) -> Origin:
        for leaf in jax.tree.leaves((args, kwargs)):
            if isinstance(leaf, np.ndarray):
                self._note(leaf)
        program, _ = trace_afresh(lambda given: problem.read(*given), (args, kwargs))
        return Origin(f"{number} {self._num_edits} {program.fingerprint}")

    def _note(self, array: np.ndarray) -> None:
        known, new = self._digests.get(id(array)), digest_array(array)
        self._num_edits += known is not None and known[0]() is array and known[1] != new
        self._digests[id(array)] = weakref.ref(array), new

    def __reduce__(self) -> tuple[type, tuple]:
        return Origins, ()


class Ravelled(NamedTuple):
    """The two maps between a flat vector and the pytree that a bare density takes."""

    flatten: Callable[[PyTree], Float[Array, " dim"]]
    unflatten: Callable[[Float[Array, " dim"]], PyTree]


def layout(problem: Problem) -> Layout | Ravelled:
    """Make the layout of ``z`` by latent site.

    Unconstrained values have the site's shape if they have as many entries as the site, else they are flat. A bare
    density has no sites: its ``z`` is the pytree that it takes.
    """
    if not problem.latents:
        return Ravelled(problem.unconstrain, problem.constrain)
    shapes = (site.shape if math.prod(site.shape) == site.size else (site.size,) for site in problem.latents)
    return Layout(tuple(site.name for site in problem.latents), tuple(shapes))


def flatten_sites(problem: Problem, sites: PyTree) -> Float[Array, " dim"]:
    """Join unconstrained values of the user to one vector.

    Raises:
        ValueError: if sites are missing, unknown or of the wrong size.
    """
    if not problem.latents:
        return layout(problem).flatten(sites)
    expected = {site.name: site.size for site in problem.latents}
    if {name: jnp.size(value) for name, value in sites.items()} != expected:
        shapes = {name: jnp.shape(value) for name, value in sites.items()}
        raise ValueError(f"Expected unconstrained values of these sites and sizes: {expected}, got shapes {shapes}.")
    return layout(problem).flatten(sites)


def check_density(problem: Problem, y: Sites, *, gradient: bool) -> None:
    """Check at draws from the prior that the density is not NaN and, if ``gradient``, that its gradient is finite.

    Otherwise proposals would have no weight, or local moves would never be accepted.

    Raises:
        RuntimeError: if the check fails at all draws.
    """
    if problem.simulate is None or is_traced(y):
        return
    with evaluated_at_once():
        z, bad = _prior_draws(problem, y, gradient)
        if bool(np.asarray(bad).all()):
            raise RuntimeError(f"{NO_START} at any of {bad.size} draws from the prior.{blame(problem, z[0], y)}")


@eqx.filter_jit
def _prior_draws(problem: Problem, y: Sites, gradient: bool) -> tuple[Float[Array, "num dim"], Bool[Array, " num"]]:
    """Draw from the prior, and flag the draws at which the log density is NaN or the gradient is not finite."""
    simulate = problem.simulate
    assert simulate is not None
    z = jax.vmap(lambda key: simulate(key)[0])(jax.random.split(jax.random.key(0), 32))

    def flag(z: Float[Array, " dim"]) -> Bool[Array, ""]:
        if not gradient:
            return jnp.isnan(problem.log_joint(z, y))
        value, slope = differentiate(lambda z: problem.log_joint(z, y), z)(z)
        return jnp.isnan(value) | jnp.isfinite(value) & ~jnp.isfinite(slope).all()

    return z, jax.vmap(flag)(z)


def unconstrain(problem: Problem, rng_key: Array, values: Sites) -> Sites:
    """Unconstrain values of the user, for one chain, or for all chains if ``rng_key`` is a batch of keys."""

    def one(values: Sites) -> Sites:
        return layout(problem).unflatten(problem.unconstrain(values))

    return one(values) if is_prng_key(rng_key) else jax.vmap(one)(values)


def same_bits(a: Array, b: Array) -> Bool[Array, ""]:
    """Say whether two arrays are equal bit by bit. NaN equals itself, and keys are compared without rounding."""

    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jnp.all(bits(a) == bits(b))


@jax.custom_batching.custom_vmap
def any_chain(flag: Array) -> Array:
    """Say whether the flag is true for any chain of every `vmap`.

    A batched flag would turn `lax.cond` into a select, which runs both branches.
    """
    return flag


@any_chain.def_vmap
def _(_size: int, _in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return any_chain(jnp.any(flag)), False
