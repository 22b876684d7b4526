"""Helpers for pytrees: flat vectors and site dictionaries, batches, names of arrays."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from scoreinfer._devices import num_devices
from scoreinfer._typing import Sites

P = ParamSpec("P")
R = TypeVar("R")


class Layout(NamedTuple):
    """The order and the shapes of named arrays in one flat vector.

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
        """Cut one vector into the named arrays.

        Raises:
            ValueError: if the shape of ``z`` is not ``(dim,)``.
        """
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
    """Call ``function`` on the numbers 0 to ``num`` - 1, ``size`` at a time, and concatenate the results.

    Where several devices are in use, each may have ``size`` numbers at a time. The last batch is padded with copies of
    the last number, so that only one shape is compiled. After each batch, ``done`` is called with the count of numbers
    in it, without padding.
    """
    parts, size = [], size * max(min(num_devices(), -(-num // size)), 1)
    for start in range(0, num, size):
        count = min(size, num - start)
        parts.append(function(jnp.asarray(np.minimum(start + np.arange(size), num - 1))))
        done(count)
    return parts[0] if num == size else _joined(tuple(parts), num)


@functools.partial(jax.jit, static_argnums=1)
def _joined(parts: tuple[PyTree, ...], num: int) -> PyTree:
    """Concatenate batches and cut off the padding; one program instead of one for every array."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num], *parts)


def is_array(leaf: Any) -> bool:
    """Say whether a leaf is a NumPy or JAX array (or a tracer of one)."""
    return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def arrays_by_name(tree: PyTree) -> dict[str, Any]:
    """Name the arrays (or array shapes) of a pytree by their paths.

    >>> list(arrays_by_name({"a": (np.zeros(2), "text", np.ones(3))}))
    ['a.0', 'a.2']
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in paths if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)}


def named_leaves(values: Mapping[str, PyTree]) -> dict[str, Any]:
    """Name the arrays of every site by the site; in a tree of arrays, by the site and the path.

    >>> list(named_leaves({"b": np.zeros(2), "a": {"w": np.ones(3)}}))
    ['b', 'a.w']
    """
    return {label: leaf for name, value in values.items() for label, leaf in arrays_by_name({name: value}).items()}


def put_arrays(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """Replace a pytree's arrays (or array shapes) by the arrays of the same names."""

    def put(path: Any, leaf: Any) -> Any:
        named = is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(arrays[_name(path)]) if named else leaf

    return jax.tree_util.tree_map_with_path(put, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_traced(tree: Any) -> bool:
    """Say whether any leaf is a tracer, which has no values yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def evaluated_at_once() -> contextlib.AbstractContextManager[None]:
    """Evaluate immediately, also inside jit, everything that does not depend on tracers.

    Outside jit JAX does so anyway, and nothing is changed. JAX's own context would do harm there: programs traced in it
    fold constants, which breaks equinox's run-time checks and `jax.debug_nans`.
    """
    return jax.ensure_compile_time_eval() if is_traced(jnp.zeros(())) else contextlib.nullcontext()


def own_broadcasting(function: Callable[P, R]) -> Callable[P, R]:
    """Allow rank promotion inside ``function``, even if the user has set ``jax_numpy_rank_promotion`` to forbid it."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return inside
