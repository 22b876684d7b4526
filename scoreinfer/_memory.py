"""Bounded memory: what one evaluation of a function takes, and evaluations of many rows a few at a time.

The equations of the traced function tell what one row takes; nothing is compiled. Two bounds follow. All arrays of the
rows that are evaluated together must fit in the memory that is allowed. On the CPU the widest of them should also fit
in a cache of one core: a logistic regression's gradients take a seventh of the time then (100,000 observations).

Numbers of rows are powers of two. They do not change what is computed for a row, but the order of sums, and so the last
digits.
"""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from scoreinfer._devices import split

MAX_MEMORY, SHARE = 1 << 30, 0.25
"""By default, arrays may take one gibibyte, or this share of all memory where that is less. Chosen by judgement: they
do not depend on what else runs, so a machine always computes the same digits."""
CACHED, LEAST_CACHED = 1 << 21, 16
"""Bytes of the widest array of rows that are evaluated together on the CPU, but no fewer rows than this. Measured: 1 to
2 MB are best, for regressions of 1,000 to 100,000 observations; values of fewer than 16 rows take up to nine times as
long each, as products with matrices lose their fast form."""
MANY = 8192
"""Where so many rows fit, no number of rows is set: one program then serves all problems. No batch is larger."""
UNKNOWN_LENGTH = 100
"""Passes that are counted for a loop that ends by a condition. Chosen by judgement."""


class Footprint(NamedTuple):
    """Bytes and work that one evaluation takes, apart from what all evaluations share.

    Args:
        total: most bytes that are needed at once, if no operations are merged; compiled programs need less.
        widest: bytes of the widest array that one operation makes.
        work: number of operations on numbers, roughly: sums of products count every product, a loop of unknown length
            counts `UNKNOWN_LENGTH` times.
    """

    total: int
    widest: int
    work: int


def footprint(function: Callable[..., PyTree], argument: PyTree, *shared: PyTree) -> Footprint:
    """Find the bytes that one evaluation of a function takes; nothing is computed or compiled.

    Args:
        function: the function.
        argument: its first argument, or the shapes and dtypes of it.
        *shared: further arguments, the same for all evaluations.
    """
    closed = jax.make_jaxpr(lambda *arguments: function(*arguments))(argument, *shared)
    num = len(jax.tree.leaves(argument))
    return _of_equations(closed.jaxpr, [number < num for number in range(len(closed.jaxpr.invars))])


def default_memory() -> int:
    """Return one gibibyte, or a quarter of the memory (a power of two, rounded down) where that is less."""
    quarter = int(SHARE * _total())
    return min(MAX_MEMORY, 1 << max(quarter.bit_length() - 1, 0))


def rows_at_once(taken: Footprint, max_memory: int | None = None) -> int | None:
    """Choose how many rows are evaluated together: a power of two, or None for any number.

    Args:
        taken: bytes of one row.
        max_memory: bytes that the rows' arrays may take; one row is always allowed. None means `default_memory`.
    """
    most = (default_memory() if max_memory is None else max_memory) // max(taken.total, 1)
    if jax.default_backend() == "cpu":
        most = min(most, max(CACHED // max(taken.widest, 1), LEAST_CACHED))
    return None if most >= MANY else 1 << max(most.bit_length() - 1, 0)


def each(function: Callable[..., PyTree], target: Any) -> Callable[..., PyTree]:
    """Make the function that evaluates every row, at most ``target.at_once`` rows together, if it has this number."""
    return map_rows(function, getattr(target, "at_once", None))


def map_rows(function: Callable[..., PyTree], at_once: int | None) -> Callable[..., PyTree]:
    """Make the function that evaluates every row, as `jax.vmap` does, at most ``at_once`` rows together.

    Without a number, or if there are no more rows than that, it is `jax.vmap` itself. Several devices share the rows
    (`scoreinfer._devices`), and each evaluates at most ``at_once`` together.

    Args:
        function: a function of one row of each argument.
        at_once: number of rows. None means all.

    Exactness: as for `jax.vmap`, up to the rounding of sums in another order.
    """

    def evaluate(*rows: PyTree) -> PyTree:
        num = jax.tree.leaves(rows)[0].shape[0]
        if at_once is None or num <= at_once:
            return jax.vmap(function)(*rows)
        return jax.lax.map(lambda row: function(*row), rows, batch_size=at_once)

    return split(evaluate)


def _of_equations(jaxpr: Any, varies: list[bool]) -> Footprint:
    """Go through the equations, and count the arrays that are still needed and differ between rows."""
    differ = {id(variable) for variable, varying in zip(jaxpr.invars, varies, strict=True) if varying}
    last = {id(variable): number for number, equation in enumerate(jaxpr.eqns) for variable in equation.invars}
    last |= {id(variable): len(jaxpr.eqns) for variable in jaxpr.outvars}
    alive: dict[int, int] = {}
    total = widest = work = 0
    for number, equation in enumerate(jaxpr.eqns):
        varying = [id(variable) in differ for variable in equation.invars]
        if not any(varying):
            continue
        differ |= {id(variable) for variable in equation.outvars}
        made = {id(variable): _num_bytes(variable.aval) for variable in equation.outvars}
        inner = [_of_equations(part, _inner_varying(equation, part, varying)) for part in _parts(equation)]
        now = sum(alive.values()) + max(sum(made.values()), *(one.total for one in inner), 0)
        total = max(total, now)
        widest = max(widest, *((one.widest for one in inner) if inner else made.values()), 0)
        work += sum(one.work for one in inner) * _num_passes(equation) if inner else _num_operations(equation)
        alive = {name: size for name, size in (alive | made).items() if last.get(name, -1) > number}
    return Footprint(total, widest, work)


def _inner_varying(equation: Any, part: Any, varying: list[bool]) -> list[bool]:
    """Say which inputs of a called function differ between rows: also what a loop carries, if any input of it does."""
    if equation.primitive.name == "scan":
        # inputs: constants, what is carried, slices; outputs: what is carried, slices (one axis more outside)
        num_carried = sum(not _sliced(*pair) for pair in zip(equation.outvars, part.outvars, strict=True))
        num_whole = sum(not _sliced(*pair) for pair in zip(equation.invars, part.invars, strict=True))
        carried = range(num_whole - num_carried, num_whole)
        return [now or number in carried for number, now in enumerate(varying)]
    if equation.primitive.name == "while":
        num_cond, num_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        own = varying[:num_cond] if part is equation.params["cond_jaxpr"].jaxpr else varying[num_cond:][:num_body]
        return own + [True] * (len(part.invars) - len(own))
    return varying if len(part.invars) == len(varying) else [True] * len(part.invars)


def _sliced(outer: Any, inner: Any) -> bool:
    return len(getattr(outer.aval, "shape", ())) > len(getattr(inner.aval, "shape", ()))


def _parts(equation: Any) -> list[Any]:
    """List the functions that an equation calls."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns"))
    return [getattr(part, "jaxpr", part) for part in leaves if hasattr(part, "eqns")]


def _num_passes(equation: Any) -> int:
    return UNKNOWN_LENGTH if equation.primitive.name == "while" else equation.params.get("length", 1)


def _num_operations(equation: Any) -> int:
    made = sum(math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars)
    if equation.primitive.name != "dot_general":
        return made
    (summed, _), _ = equation.params["dimension_numbers"]
    return made * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)


def _num_bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return math.prod(getattr(aval, "shape", ())) * getattr(dtype, "itemsize", 4)


def _total() -> int:
    """Find the bytes of the device where arrays are made. Without an answer they are enough."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(MAX_MEMORY / SHARE)
