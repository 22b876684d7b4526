"""Several devices: rows of a batch are split over them, everything else runs alike on each.

`scoreinfer.use_devices` says which devices. A program that is compiled for them (`scoreinfer._program.over_devices`)
evaluates rows (`scoreinfer._memory.map_rows`) in equal parts, one on each device, and then hands all results to all
devices. No sum runs over devices, so that row i is computed as it is on one device. Results return as arrays of one
device.

Where several processes run the same code (`jax.distributed`), the devices of all are used, and each gets all results.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "batch"
"""The axis of the mesh; rows of a batch lie along it."""
_IN_USE: ContextVar[Mesh | None] = ContextVar("in_use", default=None)
_OF_TRACE: ContextVar[Mesh | None] = ContextVar("of_trace", default=None)


@contextlib.contextmanager
def use_devices(devices: Sequence[jax.Device] | None = None) -> Iterator[None]:
    """Split simulations, draws, weights, particles, members and minibatches over several devices.

    Models, keys and results stay the same. Chains of NumPyro's `MCMC` are not touched: for them there is
    ``chain_method="parallel"``. Several processes that run the same code (after `jax.distributed.initialize`) use the
    devices of all together. They must make the same calls, and run on machines of the same kind.

    Args:
        devices: the devices. None means all of `jax.devices()`.

    Raises:
        ValueError: if there is no device, or one is named twice.

    Exactness: the same key gives the same draws for any number of devices, to the last bit or nearly so: no sum runs
        over devices. Gradients in training are the exception, as they are sums over the minibatch. Their rounding
        differs, and the weights of the network drift apart with the number of steps.

    >>> with use_devices(jax.devices()):
    ...     num_devices() == len(jax.devices())
    True
    """
    chosen = jax.devices() if devices is None else list(devices)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"`devices` must be one or more different devices of `jax.devices()`, got {chosen}.")
    mesh = None if chosen == jax.local_devices()[:1] else Mesh(np.array(chosen), (AXIS,))
    with _set(_IN_USE, mesh):
        yield


def mesh_in_use() -> Mesh | None:
    """Return the mesh of the devices in use. None means JAX's default device alone."""
    return _IN_USE.get()


def num_devices() -> int:
    """Return the number of devices in use."""
    mesh = _IN_USE.get()
    return 1 if mesh is None else mesh.size


def mesh_of_trace() -> Mesh | None:
    """Return the mesh over which the program that is being traced splits rows. None means it does not."""
    return _OF_TRACE.get()


def splitting(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Trace a program that splits rows over a mesh."""
    return _set(_OF_TRACE, mesh)


def split(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Make the function that gives every device of the program an equal part of the rows, and all of them all results.

    If the number of devices does not divide that of rows, the last row is repeated. Functions that are split inside
    ``function`` are not split again.

    Args:
        function: a function of batches, row by row.
    """
    mesh = _OF_TRACE.get()
    if mesh is None:
        return function

    def on_one_device(*rows: PyTree) -> PyTree:
        with splitting(None):
            return jax.lax.all_gather(function(*rows), AXIS, tiled=True)

    def evaluate(*rows: PyTree) -> PyTree:
        num = jax.tree.leaves(rows)[0].shape[0]
        filled = jnp.minimum(jnp.arange(num + -num % mesh.size), num - 1)
        rows = rows if len(filled) == num else jax.tree.map(lambda leaf: jnp.asarray(leaf)[filled], rows)
        results = jax.shard_map(
            on_one_device, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(), check_vma=False
        )(*rows)
        return jax.tree.map(lambda leaf: leaf[:num], results)

    return evaluate


def everywhere(tree: PyTree) -> PyTree:
    """Keep arrays whole on every device of the program."""
    return _laid_out(tree, PartitionSpec())


def spread(batch: PyTree) -> PyTree:
    """Spread the rows of a batch over the devices of the program; what is computed of them follows by itself."""
    return _laid_out(batch, PartitionSpec(AXIS))


def _laid_out(tree: PyTree, where: PartitionSpec) -> PyTree:
    mesh = _OF_TRACE.get()
    if mesh is None:
        return tree
    layout = NamedSharding(mesh, where)
    constrain = lambda leaf: jax.lax.with_sharding_constraint(leaf, layout) if isinstance(leaf, jax.Array) else leaf  # noqa: E731
    return jax.tree.map(constrain, tree)


def at_home(tree: PyTree) -> PyTree:
    """Take arrays that are bound to devices to the default device, free to go to others."""
    return jax.tree.map(lambda leaf: _freed(leaf) if _is_bound(leaf) else leaf, tree)


def _is_bound(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed


def _freed(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_freed(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))


@contextlib.contextmanager
def _set(variable: ContextVar[Mesh | None], mesh: Mesh | None) -> Iterator[None]:
    token = variable.set(mesh)
    try:
        yield
    finally:
        variable.reset(token)
