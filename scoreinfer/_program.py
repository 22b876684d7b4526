"""Programs: functions that are traced again, so that they see the current values of what they close over.

A compiled function keeps the values that it closed over when it was traced. If those values may have changed, the
function is traced again, which is cheap. The closed-over values are inputs of the program. So programs with the same
text share one compilation, even if their constants differ.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from scoreinfer._devices import at_home, everywhere, mesh_in_use, mesh_of_trace, splitting
from scoreinfer._tree import is_array, is_traced

NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""The errors that JAX raises if a function needs the values of traced arrays."""
RUN_ONCE = {"xla_backend_optimization_level": 0}
"""Compiler options of programs that run once on little data: compilation takes half as long (measured on the CPU)."""

F = TypeVar("F", bound=Callable)


def run_once(function: F) -> F:
    """Compile a function that runs once on little data, with `RUN_ONCE`; inside another program it is plain."""
    jit: Any = eqx.filter_jit  # its annotations lack the options of `jax.jit`
    compiled = jit(function, compiler_options=RUN_ONCE)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        inside = is_traced((args, kwargs, jnp.zeros(())))
        return (function if inside else compiled)(*args, **kwargs)

    return cast(F, run)


def over_devices(function: F) -> F:
    """Compile a function, as `equinox.filter_jit` does, for the devices in use: they share its rows (`_devices`).

    Inside another program it does as that program does.
    """

    def for_mesh(mesh: Mesh | None, *args: Any, **kwargs: Any) -> Any:
        with splitting(mesh):
            return everywhere(function(*args, **kwargs))

    for_mesh.__name__ = for_mesh.__qualname__ = function.__name__
    compiled = eqx.filter_jit(for_mesh)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = _mesh_for((args, kwargs))
        if mesh is None:
            return compiled(None, *args, **kwargs)
        args, kwargs = at_home((args, kwargs))
        return at_home(compiled(mesh, *args, **kwargs))

    return cast(F, run)


def _mesh_for(args: PyTree) -> Mesh | None:
    """Return the mesh over which a program with these arguments splits rows: inside another one, as that does."""
    mesh = mesh_in_use()
    return mesh_of_trace() if mesh is not None and is_traced((args, jnp.zeros(()))) else mesh


class Program:
    """A traced function: the operations that its outputs need, and the constants in them.

    Two programs are equal if their texts are equal, and call the same functions outside of JAX. Their constants may
    differ.

    Args:
        function: the function. It is traced immediately.
        *args: its arguments, or their shapes and dtypes.

    Attributes:
        constants: the arrays that the function closed over.
        uses: for each leaf of the arguments, whether the outputs need it.
        shapes: shapes and dtypes of the arguments.
        text: the operations.
        fingerprint: a digest of text and constants.
    """

    def __init__(self, function: Callable[..., PyTree], *args: PyTree) -> None:
        # A new function each time, because JAX caches its traces by function.
        traced, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
        self._treedef = jax.tree.structure(shapes)
        self.shapes = jax.eval_shape(lambda *args: args, *args)
        equations, needed = _needed(traced.jaxpr)
        constants = [pair for pair in zip(traced.jaxpr.constvars, traced.consts, strict=True) if id(pair[0]) in needed]
        self.uses = [id(variable) in needed for variable in traced.jaxpr.invars]
        self._jaxpr = traced.jaxpr.replace(
            constvars=[variable for variable, _ in constants],
            invars=[v for v, used in zip(traced.jaxpr.invars, self.uses, strict=True) if used],
            eqns=equations,
        )
        # Copy the constants: one may share memory with an array that is edited in place later.
        self.constants = [value if isinstance(value, jax.Array) else np.array(value) for _, value in constants]
        inner = [digest_array(value) for value in _inner_constants(self._jaxpr)]
        self.text = f"{self._jaxpr} {self.uses} {len(constants)} {inner}"
        self._callbacks = list(_callbacks(self._jaxpr))
        self.fingerprint = _hash(" ".join([self.text, *map(digest_array, self.constants)]).encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.text == other.text and self._callbacks == other._callbacks

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def is_trivial(self) -> bool:
        """Whether the program has no operations: every output is an input or a constant."""
        return not self._jaxpr.eqns

    def __call__(self, constants: list[Any], *args: PyTree) -> PyTree:
        """Run the program with these constants."""
        leaves = [leaf for leaf, used in zip(jax.tree.leaves(args), self.uses, strict=True) if used]
        return jax.tree.unflatten(self._treedef, jax.core.eval_jaxpr(self._jaxpr, constants, *leaves))


class Traced(eqx.Module):
    """A function of one array that was traced; its constants are arrays.

    Programs that are given two such functions are the same if their texts are.

    Args:
        function: the function.
        example: its argument, or the shape and dtype of it.

    >>> first, second = (Traced(lambda x, y=jnp.array(y): x * y, jnp.zeros(3)) for y in (2.0, 5.0))
    >>> jax.tree.structure(first) == jax.tree.structure(second), first(jnp.ones(1)).tolist()
    (True, [2.0])
    """

    constants: list[Any]
    program: Program = eqx.field(static=True)

    def __init__(self, function: Callable[[Any], PyTree], example: Any) -> None:
        self.program = Program(function, example)
        self.constants = self.program.constants

    def __call__(self, x: Any) -> PyTree:
        """Compute the function."""
        (example,) = self.program.shapes
        return self.program(self.constants, x.astype(example.dtype))


def execute(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function by a program that is compiled once for all functions that do the same with other constants."""
    mesh = _mesh_for(args)
    with splitting(mesh):
        program = Program(lambda *args: everywhere(function(*args)), *args)
    if mesh is None:
        return _compiled(program, None, program.constants, *args)
    constants, args = at_home((program.constants, args))
    return at_home(_compiled(program, mesh, constants, *args))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(program: Program, mesh: Mesh | None, constants: list[Any], *args: Any) -> Any:
    return program(constants, *args)


def trace_afresh(function: Callable[..., PyTree], tree: PyTree, *others: Any) -> tuple[Program, list[Any]]:
    """Trace a function of a pytree. The arrays in the pytree become inputs of the program.

    If the function needs the values of the arrays, none of them becomes an input.

    Args:
        function: the function.
        tree: its first argument.
        *others: further arguments. They are always inputs.

    Returns:
        The program (its arguments are the arrays and the further arguments), and the arrays.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_open = [is_array(leaf) and _is_numeric(leaf) for leaf in leaves]
    arrays = [_canonical(leaf) for leaf, open_ in zip(leaves, is_open, strict=True) if open_]

    def rebuilt(arrays: list[Any], *others: Any) -> PyTree:
        rest = iter(arrays)
        filled = [next(rest) if open_ else leaf for open_, leaf in zip(is_open, leaves, strict=True)]
        return function(jax.tree.unflatten(treedef, filled), *others)

    try:
        return Program(rebuilt, shapes_of(arrays), *others), arrays
    except NEEDS_VALUES:
        return Program(lambda _, *others: function(tree, *others), [], *others), []


def shapes_of(arrays: list[Any]) -> list[jax.ShapeDtypeStruct]:
    """List the shapes and dtypes of arrays."""
    return [jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array)) for array in arrays]


def own(leaf: Any) -> Any:
    """Copy a NumPy array, so that a later edit in place does not change the values that were read.

    The copy also makes the edit visible: JAX may reuse its converted copy of an array that was edited in place.
    """
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _canonical(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, jnp.result_type(leaf))


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) or leaf.dtype.kind in "biufc"


def _needed(jaxpr: Any) -> tuple[list[Any], set[int]]:
    """Find the top-level equations that the outputs need, and the ids of their variables."""
    equations, needed = [], {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            equations.append(equation)
            needed |= {id(variable) for variable in equation.invars}
    return equations[::-1], needed


def _callbacks(jaxpr: Any) -> Iterator[Any]:
    """Yield the functions outside of JAX that a program calls; its text does not tell them apart."""
    for equation in jaxpr.eqns:
        if "callback" in equation.params:
            callback = equation.params["callback"]
            yield getattr(callback, "callback_func", callback)
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            if hasattr(part, "eqns"):
                yield from _callbacks(getattr(part, "jaxpr", part))


def _inner_constants(jaxpr: Any) -> Iterator[Any]:
    """Yield the constants of the functions that a program calls."""
    for equation in jaxpr.eqns:
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            if hasattr(part, "eqns"):
                yield from getattr(part, "consts", ())
                yield from _inner_constants(getattr(part, "jaxpr", part))


def digest_array(value: Any) -> str:
    """Digest one array. A tracer has no values: its text (type, dtype and shape) is returned instead."""
    if is_traced(value):
        return str(value)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():  # also inside jit
            value = jax.random.key_data(value)
    value = np.asarray(value)
    return f"{value.dtype}{value.shape}{_hash(value.tobytes())}"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
