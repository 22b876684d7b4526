"""Properly weighted samplers: what drawing, certificates and kernels ask of every proposal.

A proposal draws z with a weight w such that E[w h(z)] = integral of h(z) p(z, y) dz for every function h. Importance
sampling, weights over extended paths and particle filters are all of this form.

References: Liu 2001, "Monte Carlo Strategies in Scientific Computing", section 2.5.4; Naesseth, Lindsten and Schon
2019, arXiv 1903.04797, section 2.4.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.problem import Problem


class Target(eqx.Module):
    """The posterior of one observation as a log density, up to the evidence: z -> log p(z, y).

    A pytree whose only arrays are the data, so that programs compile once for all data.

    Args:
        problem: the problem.
        y: the observation.
    """

    problem: Problem = eqx.field(static=True)
    y: Sites

    def __call__(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log p(z, y); zero where the model has no density, so that log weights are -log q."""
        return self.problem.log_joint(z, self.y) if self.problem.has_density else jnp.zeros((), z.dtype)


class Weighted(NamedTuple):
    """One weighted draw, or (with a leading axis) several.

    Args:
        z: unconstrained values.
        log_weight: log weights; NaN where the model's density failed.
        log_target: log p(z, y); zero where the model has no density.
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
        """Log density of the proposal, log p(z, y) - log w; NaN where p is zero."""
        return self.log_target - self.log_weight


class AbstractProposal(eqx.Module):
    """A properly weighted sampler. It holds arrays; the target is handed to it.

    Exactness: the weights are proper for any values of the arrays, trained or not.
    """

    @abc.abstractmethod
    def context(self, target: Target) -> Any:
        """Embed one observation."""

    @abc.abstractmethod
    def sample(self, key: Key, target: Target, context: Any) -> Weighted:
        """Draw one z with its weight."""

    @abc.abstractmethod
    def weigh(self, key: Key, target: Target, context: Any, z: Float[Array, " dim"]) -> Weighted:
        """Weigh a given z; where weights are over paths, over a path drawn anew with ``key``."""


class AbstractDensityProposal(AbstractProposal):
    """A proposal whose density q is known, on z or on an extended path: w = p(z, y) / q(z)."""

    @abc.abstractmethod
    def propose(self, key: Key, context: Any) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""

    @abc.abstractmethod
    def log_q(self, key: Key, context: Any, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z; for path weights, over a path drawn anew."""

    def sample(self, key, target, context):
        """Draw one z and weigh it by p / q."""
        return _weighted(target, *self.propose(key, context))

    def weigh(self, key, target, context, z):
        """Weigh a given z by p / q."""
        return _weighted(target, z, self.log_q(key, context, z))


def _weighted(target: Target, z: Float[Array, " dim"], log_q: Float[Array, ""]) -> Weighted:
    log_target = target(z)
    return Weighted(z, log_target - log_q, log_target)
