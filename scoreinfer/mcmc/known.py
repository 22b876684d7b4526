"""The problems that kernels have read: a new kernel of the same model finds the compiled programs of earlier ones.

Programs are compiled for a `Problem`, and two problems are never equal. A problem is known as long as a kernel or a
compiled program holds it.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from scoreinfer._program import trace_afresh
from scoreinfer.mcmc.contract import observe
from scoreinfer.model import from_numpyro
from scoreinfer.problem import Problem, from_potential

_KNOWN: dict[int, tuple[Callable, str, weakref.ref[Problem]]] = {}
"""By the identity of a problem: its function, the fingerprint of a bare density, the problem."""


def problem_of_model(
    model: Callable | None, args: tuple, kwargs: dict[str, Any], own: Iterable[Problem] = ()
) -> Problem:
    """Find or read the problem of a model with these arguments.

    A known problem is taken where the data of the arguments fit it: its design is the same. Those that the kernel has
    of its ``own`` come first.
    """
    for known in chain(own, (problem for problem, _ in _find(model))):
        with contextlib.suppress(ValueError):
            observe(known, args, kwargs)
            return known
    assert model is not None
    return _remember(model, "", from_numpyro(model, *args, **kwargs))


def problem_of_potential(potential_fn: Callable, example: PyTree) -> Problem:
    """Find or make the problem of a bare density of pytrees like ``example``.

    A known problem is taken where the density is the same program with the same constants.
    """
    example = jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jnp.result_type(leaf)), example)
    program = trace_afresh(potential_fn, example)[0].fingerprint
    for known, of in _find(potential_fn):
        if of == program:
            return known
    return _remember(potential_fn, program, from_potential(potential_fn, example))


def _find(function: Callable | None) -> Iterator[tuple[Problem, str]]:
    """Go through the known problems of a function, the latest first."""
    for of, program, reference in reversed(list(_KNOWN.values())):
        problem = reference()
        if problem is not None and of is function:
            yield problem, program


def _remember(function: Callable, program: str, problem: Problem) -> Problem:
    number = id(problem)
    _KNOWN[number] = function, program, weakref.ref(problem, lambda _: _KNOWN.pop(number, None))
    return problem
