"""The learned sampler of one problem: whitening, embedding, score and sampler behind two functions."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.nets import Embedding
from scoreinfer.problem import Problem
from scoreinfer.sampling import AbstractSampler
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

    Exactness: ``log_q`` is exact for the flow and exact over paths for the reverse SDE (see the samplers), so
    weighting by log p(z, y) - log_q is exact whatever the networks learned.
    """

    standardiser: Standardiser
    whitening: Whitening
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
        return Context(self.whitening(x), self.embedding(x))

    def propose(self, key: Key, context: Context) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        u, log_q = self.sampler.sample(key, self.score, self.problem.dim, context.features)
        return _upcast(context.affine.forward(u)), _upcast(log_q - context.affine.log_det())

    def log_q(self, key: Key, context: Context, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z (the reverse SDE refreshes its path with ``key``)."""
        u = context.affine.inverse(z.astype(jnp.float32))
        log_q = self.sampler.log_q(key, self.score, u, context.features)
        return _upcast(log_q - context.affine.log_det())


def _upcast(x):
    return x.astype(jnp.result_type(float))
