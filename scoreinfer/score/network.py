"""The learned score: a network F whose inputs and outputs are scaled to unit variance at every noise level.

    D(x, s, y) = c_skip x + c_out F(c_in x, log s, y).

For x_0 of unit variance the scales of Karras et al. 2022, table 1, are c_skip = 1 / (1 + s^2),
c_out = s / sqrt(1 + s^2) and c_in = 1 / sqrt(1 + s^2). With F = 0 the score is that of N(0, I).

References: Karras et al. 2022, arXiv 2206.00364, equation 7 and table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer._typing import Key, Sites
from scoreinfer.nets import ConditionalMLP, Embedding
from scoreinfer.score.base import AbstractScore

LOG_VARIANCE = -12.0, 6.0
"""Bounds of the log relative variance. Chosen by judgement: standard deviations of 1/400 to 20 times those for
x_0 ~ N(0, I). Without bounds an untrained network could overflow."""


def preconditioners(level: Float[Array, "..."]) -> tuple[Array, Array, Array]:
    """Compute c_skip, c_out and c_in at noise level s."""
    total = 1.0 + level**2
    return 1.0 / total, level / jnp.sqrt(total), 1.0 / jnp.sqrt(total)


class NeuralScore(AbstractScore):
    """The denoiser D = c_skip x + c_out F, and variances of x_0 given x_s from a second output of the network.

    Args:
        network: ``(c_in x, log s, context) -> 2 dim`` numbers. The first half is F. The second half is
            log(Var[x_0 | x_s] (1 + s^2) / s^2): the log of the variance relative to that for x_0 ~ N(0, I).

    Exactness: biased: as good as its training. The samplers' weights are exact for any network.
    """

    network: Callable[[Array, Array, PyTree], Array]

    def heads(
        self, level: Float[Array, ""], x: Float[Array, " dim"], y: PyTree = None
    ) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
        """Compute both outputs of the network: F, and the log of the relative variance."""
        level, x = jnp.float32(level), x.astype(jnp.float32)
        output = self.network(preconditioners(level)[2] * x, jnp.log(level), y)
        return output[: x.size], output[x.size :]

    def _denoise(self, level, x, y):
        first, second = self.heads(level, x, y)
        skip, out, _ = preconditioners(jnp.float32(level))
        return skip * x + out * first, out**2 * jnp.exp(jnp.clip(second, *LOG_VARIANCE))

    def denoise(self, level, x, y=None):
        """Compute D = c_skip x + c_out F."""
        return self._denoise(level, x, y)[0]

    def moments(self, level, x, y=None):
        """Compute D, and the learned variance of each component of x_0 given x."""
        return self._denoise(level, x, y)


class Unconditional(AbstractScore):
    """A learned score of no observation: its network is given an empty context.

    Exactness: biased: as good as its training.
    """

    score: NeuralScore

    def denoise(self, level, x, y=None):
        """Compute D."""
        return self.score.denoise(level, x, jnp.zeros(0, jnp.float32))

    def moments(self, level, x, y=None):
        """Compute D, and the learned variances."""
        return self.score.moments(level, x, jnp.zeros(0, jnp.float32))


class ConditionalScore(NamedTuple):
    """An embedding, which maps an observation to its context, and a score that is given this context as its y."""

    embedding: Embedding
    score: NeuralScore


def score_module(
    key: Key,
    dim: int,
    embedding: Embedding,
    x: Sites,
    *,
    width: int = 96,
    depth: int = 3,
    octaves: tuple[int, ...] = (),
) -> ConditionalScore:
    """Make an untrained score.

    Args:
        key: random key of the network's weights.
        dim: number of components of a draw.
        embedding: maps one observation to its context.
        x: standardised observations, draw axis first; only the shapes matter.
        width: width of the network.
        depth: number of its residual blocks.
        octaves: for each input, the number of sines and cosines that the network also sees of it; none where empty.
    """
    context = jax.eval_shape(embedding, jax.tree.map(lambda leaf: leaf[0], x))
    network = ConditionalMLP(key, dim, context.shape[0], 2 * dim, width=width, depth=depth, octaves=octaves)
    return ConditionalScore(embedding, NeuralScore(network))
