"""Samplers: what drawing and kernels ask of a learned proposal, and the weight of what it draws."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.problem import Problem


@runtime_checkable
class Proposer(Protocol):
    """What drawing and kernels ask of the learned sampler, an Equinox module: a `Proposal`, or a mixture of two."""

    @property
    def problem(self) -> Problem:
        """The problem that the proposal is for."""

    def context(self, y: Sites) -> Any:
        """Embed one observation."""

    def propose(self, key: Key, context: Any) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""

    def log_q(self, key: Key, context: Any, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z; for path weights, over a path drawn anew."""


class Weighted(NamedTuple):
    """One draw in the unconstrained space, or several, with the two log densities its weight is made of."""

    values: Float[Array, "*num dim"]
    log_q: Float[Array, "*num"]
    log_joint: Float[Array, "*num"]

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.values.shape[0]

    @property
    def log_weight(self) -> Float[Array, "*num"]:
        """Log importance weights; NaN where the model's density failed, or where there is none."""
        return self.log_joint - self.log_q


def draw(key: Key, proposal: Proposer, context: Any, y: Sites) -> Weighted:
    """Draw one z and weigh it."""
    z, log_q = proposal.propose(key, context)
    return Weighted(z, log_q, _log_joint(proposal.problem, z, y))


def weigh(key: Key, proposal: Proposer, context: Any, y: Sites, z: Float[Array, " dim"]) -> Weighted:
    """Weigh a given z."""
    return Weighted(z, proposal.log_q(key, context, z), _log_joint(proposal.problem, z, y))


def _log_joint(problem, z, y):
    return problem.log_joint(z, y) if problem.has_density else jnp.full((), jnp.nan, z.dtype)
