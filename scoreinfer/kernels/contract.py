"""What NumPyro's kernel contract asks of every kernel here: data from the arguments of each call, states by site."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from scoreinfer._tree import Layout, is_traced
from scoreinfer._typing import Sites
from scoreinfer.problem import Problem


def observe(problem: Problem, args: tuple, kwargs: dict[str, Any]) -> Sites:
    """Read the observation, as arrays without weak types; values that are known are looked at while tracing too."""
    # With traced arguments the model itself is traced, and must not be evaluated piece by piece meanwhile.
    with contextlib.nullcontext() if is_traced((args, kwargs)) else jax.ensure_compile_time_eval():
        y = problem.read(args, kwargs)
        return {name: jnp.array(value, jnp.result_type(value)) for name, value in y.items()}


class Ravelled(NamedTuple):
    """The way between the flat vector of a bare density and the pytree that it takes."""

    flatten: Callable[[PyTree], Float[Array, " dim"]]
    unflatten: Callable[[Float[Array, " dim"]], PyTree]


def layout(problem: Problem) -> Layout | Ravelled:
    """Lay out ``z`` by latent site: values in the site's own shape where it has as many entries, else flat.

    A bare density has no sites, and ``z`` is the pytree that it takes.
    """
    if not problem.latents:
        return Ravelled(problem.unconstrain, problem.constrain)
    shapes = (site.shape if math.prod(site.shape) == site.size else (site.size,) for site in problem.latents)
    return Layout(tuple(site.name for site in problem.latents), tuple(shapes))


def flatten(problem: Problem, sites: PyTree) -> Float[Array, " dim"]:
    """Join unconstrained values that a user gave."""
    if not problem.latents:
        return layout(problem).flatten(sites)
    expected = {site.name: site.size for site in problem.latents}
    if {name: jnp.size(value) for name, value in sites.items()} != expected:
        shapes = {name: jnp.shape(value) for name, value in sites.items()}
        raise ValueError(f"Expected unconstrained values of these sites and sizes: {expected}; got shapes {shapes}.")
    return layout(problem).flatten(sites)


def same_bits(a: Array, b: Array) -> Bool[Array, ""]:
    """Say whether two arrays are equal bit by bit: NaN equals itself, and no key is rounded."""

    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jnp.all(bits(a) == bits(b))


@jax.custom_batching.custom_vmap
def any_chain(flag: Array) -> Array:
    """Reduce a flag over every `vmap` around it: a batched predicate would turn `lax.cond` into a select."""
    return flag


@any_chain.def_vmap
def _(_size: int, _in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return any_chain(jnp.any(flag)), False
