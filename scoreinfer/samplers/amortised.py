"""The amortised proposal: it joins whitening, embedding, score and sampler, and draws for any observation."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine, identity
from scoreinfer.bijections.base import Change
from scoreinfer.nets import Embedding, MaskedGroups
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractDensityProposal, AbstractProposal, Target
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow, ReverseSDE
from scoreinfer.score import AbstractScore, NeuralScore
from scoreinfer.score.network import score_module
from scoreinfer.training.grouped import GroupWhitening, local_latents, untrained_groups
from scoreinfer.training.simulations import Standardiser, encode
from scoreinfer.training.whitening import Whitening, untrained_whitening

INFLATION = 0.15
"""Inflation of flows whose draws are weighted (see `ProbabilityFlow`)."""


class Context(NamedTuple):
    """What the proposal computes from one observation.

    Args:
        affine: map from the whitened space to z.
        features: the embedded observation.
    """

    affine: Affine
    features: Float[Array, " features"]


class AbstractAmortised(AbstractDensityProposal):
    """A proposal that comes from amortised training: it draws for any observation."""

    @property
    @abc.abstractmethod
    def amortised(self) -> "AmortisedProposal":
        """The trained proposal, before any adaptation to one observation."""

    def features(self, target: Target) -> Sites:
        """Encode and standardise the observation."""
        return self.amortised.standardiser(encode(target.problem, target.y))

    @property
    def num_evaluations(self) -> int:
        """Number of evaluations of the score per draw."""
        return self.amortised.sampler.num_evaluations

    def at(self, target: Target) -> AbstractProposal:
        """Prepare the proposal for many batches of one observation, if its context is costly."""
        return self


class AmortisedProposal(AbstractAmortised):
    """The learned sampler of one model: it draws z for any observation and computes its ``log_q``.

    ``adjustment`` is a second affine map of z. It is the identity unless the proposal was adapted to one observation.

    Exactness: ``log_q`` is exact for the flow, and exact over paths for the reverse SDE (see
        `scoreinfer.samplers.diffusion`). The log weight log p(z, y) - log_q is therefore exact for any trained or
        untrained networks.
    """

    standardiser: Standardiser
    whitening: Whitening | GroupWhitening
    adjustment: Affine
    embedding: Embedding
    score: NeuralScore
    sampler: AbstractSampler

    @property
    def amortised(self):
        """Return the proposal itself."""
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
        """Compute the ``log_q`` of a given z. The reverse SDE draws a path from z with ``key``."""
        return log_q_whitened(key, self.sampler, self.score, *context, z)


class Size(NamedTuple):
    """Width and number of residual blocks of a network."""

    width: int
    depth: int


class Architecture(NamedTuple):
    """Hyperparameters of an amortised proposal; with the problem and the embedding they fix the shapes of its arrays.

    Args:
        whitening: size of the whitening network.
        score: size of the score network.
        sampler: the sampler that turns the score into draws.
        octaves: number of octaves of sine features, for each input of the score. Empty means no sine features.
        bend: distance of observations from the centre, in scale units, above which their scale is logarithmic.
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
    """Make an untrained proposal. With `equinox.filter_eval_shape`, only the shapes of its arrays are computed.

    Args:
        for_whitening: random key of the whitening network.
        for_score: random key of the score network.
        problem: the problem.
        architecture: the hyperparameters.
        embedding: module that maps the standardised observation to the context vector.

    Exactness: its weights are exact, as for `AmortisedProposal`.
    """
    dim = problem.dim
    x = encode(problem, {site.name: jnp.zeros(site.shape, site.dtype) for site in problem.observed})
    scale = Standardiser(x, jax.tree.map(jnp.ones_like, x), architecture.bend)
    x = scale(x)
    size = architecture.whitening._asdict()
    whitening: Whitening | GroupWhitening
    if isinstance(embedding, MaskedGroups):
        local = local_latents(problem, embedding.num_groups)
        whitening = untrained_groups(for_whitening, dim, x, embedding, local, **size)
    else:
        whitening = untrained_whitening(for_whitening, dim, x, embedding, **size)
    rows = jax.tree.map(lambda leaf: leaf[None], x)
    module = score_module(for_score, dim, embedding, rows, **architecture.score._asdict(), octaves=architecture.octaves)
    return AmortisedProposal(scale, whitening, identity(dim), module.embedding, module.score, architecture.sampler)


def propose_whitened(
    key: Key,
    sampler: AbstractSampler,
    score: AbstractScore,
    dim: int,
    whitening: Change,
    features: Float[Array, " features"],
) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    """Draw in the whitened space, and map the draw and its ``log_q`` to the space of z.

    Exactness: as for ``sampler``; the change of variables is exact.
    """
    u, log_q = sampler.sample(key, score, dim, features)
    return _upcast(whitening.forward(u)), _upcast(log_q - whitening.log_det(u))


def log_q_whitened(
    key: Key,
    sampler: AbstractSampler,
    score: AbstractScore,
    whitening: Change,
    features: Float[Array, " features"],
    z: Float[Array, " dim"],
) -> Float[Array, ""]:
    """Compute the ``log_q`` of a given z.

    Exactness: as for ``sampler``; the change of variables is exact.
    """
    u = whitening.inverse(z.astype(jnp.float32))
    return _upcast(sampler.log_q(key, score, u, features) - whitening.log_det(u))


def _upcast(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.result_type(float))


def default_sampler(dim: int, *, weighed: bool) -> AbstractSampler:
    """Choose the sampler by the number of dimensions: the flow up to 16, the reverse SDE above.

    The flow gets an inflated start if its draws are weighted (``weighed``).
    """
    return ProbabilityFlow(inflation=INFLATION if weighed else 0.0) if dim <= 16 else ReverseSDE()
