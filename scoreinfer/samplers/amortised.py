"""The learned sampler of one problem: whitening, embedding, score and sampler behind two functions."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.nets import Embedding
from scoreinfer.problem import Problem
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow, ReverseSDE
from scoreinfer.score import NeuralScore
from scoreinfer.training.simulations import Standardiser, encode
from scoreinfer.training.whitening import Whitening


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


def _propose(key, proposal, whitening, features):
    u, log_q = proposal.sampler.sample(key, proposal.score, proposal.problem.dim, features)
    return _upcast(whitening.forward(u)), _upcast(log_q - whitening.log_det(u))


def _log_q(key, proposal, whitening, features, z):
    u = whitening.inverse(z.astype(jnp.float32))
    log_q = proposal.sampler.log_q(key, proposal.score, u, features)
    return _upcast(log_q - whitening.log_det(u))


def default_sampler(dim: int, *, weighed: bool) -> AbstractSampler:
    """Choose the sampler by dimension: the flow up to 16, the reverse SDE beyond."""
    return ProbabilityFlow(inflation=0.15 if weighed else 0.0) if dim <= 16 else ReverseSDE()
