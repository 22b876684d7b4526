"""The amortised proposal: whitening, embedding, score and sampler behind two functions."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine, identity
from scoreinfer.bijections.base import Change
from scoreinfer.nets import Embedding
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractDensityProposal, Target
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow, ReverseSDE
from scoreinfer.score import NeuralScore
from scoreinfer.score.network import score_module
from scoreinfer.training.simulations import Standardiser, encode
from scoreinfer.training.whitening import Whitening, untrained_whitening


class Context(NamedTuple):
    """What one observation means to the proposal.

    Args:
        affine: the map from the whitened space to z.
        features: the embedded observation.
    """

    affine: Affine
    features: Float[Array, " features"]


class AbstractAmortised(AbstractDensityProposal):
    """A proposal that answers for any observation."""

    @property
    @abc.abstractmethod
    def amortised(self) -> "AmortisedProposal":
        """The proposal as it was trained, not adapted to any observation."""

    def features(self, target: Target) -> Sites:
        """Compute the standardised observation."""
        return self.amortised.standardiser(encode(target.problem, target.y))


class AmortisedProposal(AbstractAmortised):
    """The learned sampler of one model: draws z for an observation, with the log density of what it did.

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

    @property
    def amortised(self):
        """The proposal itself."""
        return self

    def context(self, target: Target) -> Context:
        """Embed one observation."""
        return self.embed(self.features(target))

    def embed(self, x: Sites) -> Context:
        """Embed one standardised observation."""
        return Context(self.adjustment.after(self.whitening(x)), self.embedding(x))

    def propose(self, key: Key, context: Context) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return propose_whitened(key, self.sampler, self.score, self.adjustment.mean.size, *context)

    def log_q(self, key: Key, context: Context, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z (the reverse SDE refreshes its path with ``key``)."""
        return log_q_whitened(key, self.sampler, self.score, *context, z)


class Size(NamedTuple):
    """Width and number of residual blocks of a network."""

    width: int
    depth: int


class Architecture(NamedTuple):
    """Hyperparameters of an amortised proposal: with the problem and the embedding they say what its arrays are.

    Args:
        whitening: size of the network of the whitening map.
        score: size of the score network.
        sampler: how draws are made.
        octaves: octaves of sine features of each input of the score; none: no such features.
        bend: scale units beyond which standardised observations have logarithmic tails.
    """

    whitening: Size
    score: Size
    sampler: AbstractSampler
    octaves: tuple[int, ...] = ()
    bend: float = 4.0


@eqx.filter_jit
def untrained(
    for_whitening: Key, for_score: Key, problem: Problem, architecture: Architecture, embedding: Embedding
) -> AmortisedProposal:
    """Make an untrained proposal; with `equinox.filter_eval_shape`, the shapes of its arrays alone.

    Args:
        for_whitening: random key of the whitening network.
        for_score: random key of the score network.
        problem: the problem.
        architecture: the hyperparameters.
        embedding: module from the standardised observation to the context.

    Exactness: its weights are exact like those of any other.
    """
    dim = problem.dim
    x = encode(problem, {site.name: jnp.zeros(site.shape, site.dtype) for site in problem.observed})
    scale = Standardiser(x, jax.tree.map(jnp.ones_like, x), architecture.bend)
    x = scale(x)
    whitening = untrained_whitening(for_whitening, dim, x, embedding, **architecture.whitening._asdict())
    rows = jax.tree.map(lambda leaf: leaf[None], x)
    module = score_module(for_score, dim, embedding, rows, **architecture.score._asdict(), octaves=architecture.octaves)
    return AmortisedProposal(scale, whitening, identity(dim), module.embedding, module.score, architecture.sampler)


def propose_whitened(
    key: Key,
    sampler: AbstractSampler,
    score: NeuralScore,
    dim: int,
    whitening: Change,
    features: Float[Array, " features"],
) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    """Draw in the whitened space, and map the draw and its ``log_q`` to the space of z."""
    u, log_q = sampler.sample(key, score, dim, features)
    return _upcast(whitening.forward(u)), _upcast(log_q - whitening.log_det(u))


def log_q_whitened(
    key: Key,
    sampler: AbstractSampler,
    score: NeuralScore,
    whitening: Change,
    features: Float[Array, " features"],
    z: Float[Array, " dim"],
) -> Float[Array, ""]:
    """Compute the ``log_q`` of a given z."""
    u = whitening.inverse(z.astype(jnp.float32))
    return _upcast(sampler.log_q(key, score, u, features) - whitening.log_det(u))


def _upcast(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.result_type(float))


def default_sampler(dim: int, *, weighed: bool) -> AbstractSampler:
    """Choose the sampler by dimension: the flow up to 16, the reverse SDE beyond."""
    return ProbabilityFlow(inflation=0.15 if weighed else 0.0) if dim <= 16 else ReverseSDE()
