"""The interface of proposals: properly weighted samplers, as drawing, certificates and kernels use them.

A proposal draws z with a weight w such that, for every function h,

    E[w h(z)] = integral of h(z) p(z, y) dz.

Importance sampling, weights over extended paths and particle filters all have this form.

References: Liu 2001, "Monte Carlo Strategies in Scientific Computing", section 2.5.4; Naesseth, Lindsten and Schon
2019, arXiv 1903.04797, section 2.4.
"""

import abc
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._memory import Footprint, footprint, rows_at_once
from scoreinfer._program import Program, shapes_of
from scoreinfer._tree import evaluated_at_once, is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.problem import Problem


class Target(eqx.Module):
    """The unnormalised log posterior density of one observation: z -> log p(z, y).

    It is a pytree whose only arrays are the data. Programs therefore compile once for all data, and large covariates
    are no part of them.

    Args:
        problem: the problem.
        y: the observation.
        at_once: how many values may be weighed together (`bounded_target`). None means any number.
        is_dear: whether an evaluation takes more than `DEAR` operations.
        program: the traced log density of z, y and large constants. None means that there are no large ones.
        constants: what the program closed over, such as covariates.
    """

    problem: Problem = eqx.field(static=True)
    y: Sites
    at_once: int | None = eqx.field(static=True, default=None)
    is_dear: bool = eqx.field(static=True, default=False)
    program: Program | None = eqx.field(static=True, default=None)
    constants: tuple[Array, ...] = ()

    def __call__(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log p(z, y). Without a density the result is zero, so that log weights are -log q."""
        if not self.problem.has_density:
            return jnp.zeros((), z.dtype)
        if self.program is not None:
            return self.program(list(self.constants), z.astype(jnp.result_type(float)), self.y)
        return self.problem.log_joint(z, self.y)

    def __reduce__(self):
        """Leave out the traced program, which is valid in this process only."""
        return Target, (self.problem, self.y, self.at_once, self.is_dear)


DEAR = 10_000
"""Operations from which an evaluation is dear: particles then make longer chains, and the certificate has fewer. Chosen
by judgement: forty Gaussians in ten dimensions take 2,500, a regression of 300 values on 25 covariates 29,000."""
LARGE = 1 << 20
"""Bytes of constants from which they are arguments of the programs that weigh: otherwise each holds a copy of them."""
_TRACED: WeakKeyDictionary[Problem, dict[Any, tuple[Footprint, Program | None, tuple[Array, ...]]]]
_TRACED = WeakKeyDictionary()  # tracing a model takes a tenth of a second


def bounded_target(problem: Problem, y: Sites, max_memory: int | None = None) -> Target:
    """Make a target whose values are weighed so many at a time that their arrays take no more than ``max_memory``.

    Args:
        problem: the problem.
        y: the observation.
        max_memory: bytes. None means one gibibyte, or a quarter of the memory where that is less.

    Exactness: every weight uses all of the observation. The number of values that are weighed together changes the
        rounding of sums alone.
    """
    if not problem.has_density:
        return Target(problem, y)
    names, values = tuple(y), shapes_of(list(y.values()))
    key = names, jnp.result_type(float), *((value.shape, value.dtype) for value in values)
    found = _TRACED.setdefault(problem, {})
    if key not in found:
        found[key] = _trace(problem, dict(zip(names, values, strict=True)))
    taken, program, constants = found[key]
    return Target(problem, y, rows_at_once(taken, max_memory), taken.work > DEAR, program, constants)


def _trace(problem: Problem, y: dict[str, Any]) -> tuple[Footprint, Program | None, tuple[Array, ...]]:
    """Find the bytes of a value and its gradient, or of the value alone, and the program if its constants are large."""
    z = jax.ShapeDtypeStruct((problem.dim,), jnp.result_type(float))
    program = Program(problem.log_joint, z, y)
    log_joint = partial(program, program.constants)
    try:
        taken = footprint(jax.value_and_grad(log_joint), z, y)
    except Exception:  # libraries have errors of their own for what they cannot differentiate
        taken = footprint(log_joint, z, y)
    size = sum(value.nbytes for value in program.constants)
    if size < LARGE or is_traced(program.constants):
        return taken, None, ()
    with evaluated_at_once():  # what is kept must have values, also if a compiled function asks first
        constants = tuple(v if isinstance(v, jax.Array) else jnp.asarray(v) for v in program.constants)
    return taken, program, constants


class Weighted(NamedTuple):
    """One weighted draw, or (with a leading axis) several.

    Args:
        z: unconstrained values.
        log_weight: log importance weights; NaN where the model's density is NaN.
        log_target: log p(z, y); zero if the model has no density.
    """

    z: Float[Array, "*num dim"]
    log_weight: Float[Array, "*num"]
    log_target: Float[Array, "*num"]

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.z.shape[0]

    @property
    def log_q(self) -> Float[Array, "*num"]:
        """Compute the log density of the proposal, log p(z, y) - log w; NaN where p is zero."""
        return self.log_target - self.log_weight


class AbstractProposal(eqx.Module):
    """A properly weighted sampler. It holds arrays and receives the target as an argument.

    Exactness: the weights are proper for any values of the arrays, trained or untrained.
    """

    @abc.abstractmethod
    def context(self, target: Target) -> Any:
        """Compute everything that the proposal needs of one observation."""

    @abc.abstractmethod
    def sample(self, key: Key, target: Target, context: Any) -> Weighted:
        """Draw one z with its weight."""

    @abc.abstractmethod
    def weigh(self, key: Key, target: Target, context: Any, z: Float[Array, " dim"]) -> Weighted:
        """Weigh a given z. Path weights use a path from z that is drawn with ``key``."""


class AbstractDensityProposal(AbstractProposal):
    """A proposal with known density q, on z or on an extended path: w = p(z, y) / q(z).

    Exactness: the weights are proper if ``log_q`` is the exact log density of what `propose` draws.
    """

    @abc.abstractmethod
    def propose(self, key: Key, context: Any) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""

    @abc.abstractmethod
    def log_q(self, key: Key, context: Any, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z. Path weights use a path from z that is drawn with ``key``."""

    def sample(self, key, target, context):
        """Draw one z and weigh it by p / q."""
        return _weighted(target, *self.propose(key, context))

    def weigh(self, key, target, context, z):
        """Weigh a given z by p / q."""
        return _weighted(target, z, self.log_q(key, context, z))


def _weighted(target: Target, z: Float[Array, " dim"], log_q: Float[Array, ""]) -> Weighted:
    log_target = target(z)
    impossible = (log_target == -jnp.inf) & (log_q == -jnp.inf)
    return Weighted(z, jnp.where(impossible, -jnp.inf, log_target - log_q), log_target)
