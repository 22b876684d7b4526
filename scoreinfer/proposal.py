"""The learned sampler of one problem: whitening, embedding, score and sampler behind two functions."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.change import Chain
from scoreinfer.nets import Embedding
from scoreinfer.problem import Problem
from scoreinfer.sampling import AbstractSampler, ProbabilityFlow, ReverseSDE
from scoreinfer.score import NeuralScore
from scoreinfer.simulation import Standardiser, encode
from scoreinfer.whitening import Affine, Whitening


class Context(NamedTuple):
    """What one observation means to the proposal.

    Args:
        affine: the map from the whitened space to z.
        features: the embedded observation.
    """

    affine: Affine
    features: Float[Array, " features"]


class Proposal(eqx.Module):
    """The learned sampler of one problem: draws z for an observation, with the log density of what it did.

    ``adjustment`` is a further affine map of z, the identity unless the proposal has been adapted to one observation.

    Exactness: ``log_q`` is exact for the flow and exact over paths for the reverse SDE (see the samplers), so
    weighting by log p(z, y) - log_q is exact whatever the networks learned.
    """

    standardiser: Standardiser
    whitening: Whitening
    adjustment: Affine
    embedding: Embedding
    score: NeuralScore
    sampler: AbstractSampler
    problem: Problem = eqx.field(static=True)

    def features(self, y: Sites) -> Sites:
        """Compute the standardised observation."""
        return self.standardiser(encode(self.problem, y))

    def context(self, y: Sites) -> Context:
        """Embed one observation."""
        x = self.features(y)
        return Context(self.adjustment.after(self.whitening(x)), self.embedding(x))

    def propose(self, key: Key, context: Context) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return _propose(key, self, *context)

    def log_q(self, key: Key, context: Context, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z (the reverse SDE refreshes its path with ``key``)."""
        return _log_q(key, self, *context, z)


def _upcast(x):
    return x.astype(jnp.result_type(float))


class SingleProposal(eqx.Module):
    """The learned sampler of one posterior: a whitening map, an unconditional score, a sampler.

    Exactness: as for `Proposal`.
    """

    whitening: Chain
    score: NeuralScore
    sampler: AbstractSampler
    problem: Problem = eqx.field(static=True)

    def context(self, y: Sites) -> None:
        """Return nothing: only its own observation is worth asking about."""

    def propose(self, key: Key, context: None) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return _propose(key, self, self.whitening, jnp.zeros(0, jnp.float32))

    def log_q(self, key: Key, context: None, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z."""
        return _log_q(key, self, self.whitening, jnp.zeros(0, jnp.float32), z)


def _propose(key, proposal, whitening, features):
    u, log_q = proposal.sampler.sample(key, proposal.score, proposal.problem.dim, features)
    return _upcast(whitening.forward(u)), _upcast(log_q - whitening.log_det(u))


def _log_q(key, proposal, whitening, features, z):
    u = whitening.inverse(z.astype(jnp.float32))
    log_q = proposal.sampler.log_q(key, proposal.score, u, features)
    return _upcast(log_q - whitening.log_det(u))


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


def default_sampler(dim: int, *, weighed: bool) -> AbstractSampler:
    """Choose the sampler by dimension: the flow up to 16, the reverse SDE beyond."""
    return ProbabilityFlow(inflation=0.15 if weighed else 0.0) if dim <= 16 else ReverseSDE()
