"""The interface of proposals: properly weighted samplers, as drawing, certificates and kernels use them.

A proposal draws z with a weight w such that, for every function h,

    E[w h(z)] = integral of h(z) p(z, y) dz.

Importance sampling, weights over extended paths and particle filters all have this form.

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
    """The unnormalised log posterior density of one observation: z -> log p(z, y).

    It is a pytree whose only arrays are the data. Programs therefore compile once for all data.

    Args:
        problem: the problem.
        y: the observation.
    """

    problem: Problem = eqx.field(static=True)
    y: Sites

    def __call__(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log p(z, y). Without a density the result is zero, so that log weights are -log q."""
        return self.problem.log_joint(z, self.y) if self.problem.has_density else jnp.zeros((), z.dtype)


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
