"""Flat vectors and site dictionaries; batches; names of arrays in a pytree."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from scoreinfer._typing import Sites

P = ParamSpec("P")
R = TypeVar("R")


class Layout(NamedTuple):
    """How named arrays fill one flat vector, in order.

    Args:
        names: the names, in the order in which they fill the vector.
        shapes: the shape of each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(map(math.prod, self.shapes))

    def flatten(self, sites: Sites) -> Float[Array, " dim"]:
        """Concatenate the named arrays into one vector."""
        parts = [jnp.reshape(sites[name], -1) for name in self.names]
        return jnp.concatenate(parts) if parts else jnp.zeros(0)

    def unflatten(self, z: Float[Array, " dim"]) -> Sites:
        """Cut one vector into the named arrays."""
        if jnp.shape(z) != (self.dim,):
            raise ValueError(
                f"Expected one flat vector of shape ({self.dim},), got {jnp.shape(z)}. "
                "Problem functions take one draw at a time: use jax.vmap for a batch."
            )
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = jnp.split(z, ends)
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def in_batches(
    function: Callable[[Int[Array, " size"]], PyTree],
    num: int,
    size: int,
    done: Callable[[int], Any] = lambda count: None,
) -> PyTree:
    """Call ``function`` on the numbers 0 to ``num`` - 1, ``size`` at a time, and join what it returns.

    The last batch is filled up with copies of the last number, so that one shape is compiled; ``done`` is told how
    many numbers each batch was for.
    """
    parts = []
    for start in range(0, num, size):
        count = min(size, num - start)
        part = function(jnp.asarray(np.minimum(start + np.arange(size), num - 1)))
        parts.append(part if count == size else jax.tree.map(lambda leaf, count=count: leaf[:count], part))
        done(count)
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def is_array(leaf: Any) -> bool:
    """Say whether a leaf is a NumPy or JAX array (or a tracer of one)."""
    return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def arrays_by_name(tree: PyTree) -> dict[str, Any]:
    """Name the arrays of a pytree, or their shapes, by where they are.

    >>> list(arrays_by_name({"a": (np.zeros(2), "text", np.ones(3))}))
    ['a.0', 'a.2']
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in paths if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)}


def named_leaves(values: Mapping[str, PyTree]) -> dict[str, Any]:
    """Name the arrays of every site: by the site, and within a tree of arrays by where they are.

    >>> list(named_leaves({"b": np.zeros(2), "a": {"w": np.ones(3)}}))
    ['b', 'a.w']
    """
    return {label: leaf for name, value in values.items() for label, leaf in arrays_by_name({name: value}).items()}


def put_arrays(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """Put named arrays in the places of a pytree's arrays (or of their shapes)."""

    def put(path: Any, leaf: Any) -> Any:
        named = is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(arrays[_name(path)]) if named else leaf

    return jax.tree_util.tree_map_with_path(put, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_traced(tree: Any) -> bool:
    """Say whether any leaf is a tracer, whose values cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def evaluated_at_once() -> contextlib.AbstractContextManager[None]:
    """Evaluate what does not depend on tracers at once, inside jit too.

    Outside jit that happens by itself, and JAX's own context would harm: programs traced in it fold constants, which
    equinox's run-time checks and `jax.debug_nans` do not survive.
    """
    return jax.ensure_compile_time_eval() if is_traced(jnp.zeros(())) else contextlib.nullcontext()


def own_broadcasting(function: Callable[P, R]) -> Callable[P, R]:
    """Let this package's arithmetic promote ranks, whatever the user's ``jax_numpy_rank_promotion`` says of theirs."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return inside
