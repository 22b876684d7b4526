"""The learned score: a network preconditioned so that it predicts a quantity of unit variance at every level."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer._typing import Key, Sites
from scoreinfer.nets import ConditionalMLP, Embedding
from scoreinfer.score.base import AbstractScore


def preconditioners(level: Float[Array, "..."]) -> tuple[Array, Array, Array]:
    """Compute c_skip, c_out and c_in for data of unit variance (Karras et al. 2022, table 1)."""
    total = 1.0 + level**2
    return 1.0 / total, level / jnp.sqrt(total), 1.0 / jnp.sqrt(total)


class NeuralScore(AbstractScore):
    """A denoiser D = c_skip x + c_out F(c_in x, log s, y), with a second head for the variance of x_0 given x.

    Args:
        network: ``(x, log level, context) -> 2 dim`` numbers: F, and the logarithm of the variance relative to
            that of a standard normal x_0, s^2 / (1 + s^2).

    Exactness: biased: as good as its training. The samplers' weights are exact whatever the network says.
    """

    network: Callable[[Array, Array, PyTree], Array]

    def heads(
        self, level: Float[Array, ""], x: Float[Array, " dim"], y: PyTree = None
    ) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
        """Compute the raw outputs: F, and the log variance relative to a standard normal's."""
        level, x = jnp.float32(level), x.astype(jnp.float32)
        output = self.network(preconditioners(level)[2] * x, jnp.log(level), y)
        return output[: x.size], output[x.size :]

    def _denoise(self, level, x, y):
        first, second = self.heads(level, x, y)
        skip, out, _ = preconditioners(jnp.float32(level))
        return skip * x + out * first, out**2 * jnp.exp(jnp.clip(second, -12.0, 6.0))

    def denoise(self, level, x, y=None):
        """Compute D = c_skip x + c_out F."""
        return self._denoise(level, x, y)[0]

    def moments(self, level, x, y=None):
        """Compute D and the learned marginal variances of x_0 given x."""
        return self._denoise(level, x, y)


class ConditionalScore(NamedTuple):
    """The trained pair: observation -> context, and (level, u, context) -> denoised u."""

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
    """Make an untrained score for contexts of these standardised observations (draw axis first)."""
    context = jax.eval_shape(embedding, jax.tree.map(lambda leaf: leaf[0], x))
    network = ConditionalMLP(key, dim, context.shape[0], 2 * dim, width=width, depth=depth, octaves=octaves)
    return ConditionalScore(embedding, NeuralScore(network))
