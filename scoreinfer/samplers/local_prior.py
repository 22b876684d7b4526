"""Local priors: the score of windows of a path, in units common to all times, for paths of any length."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.bijections.affine import Affine
from scoreinfer.samplers.learned_prior import LearnedPrior
from scoreinfer.score import AbstractScore, LocalScore


class LocalPrior(eqx.Module):
    """A prior of paths, known by the score of their windows of 2 k + 1 times.

    Args:
        window: score of a flat window, in units in which every component has about unit variance.
        k: half-width of the window, in times.
        mean: mean of every component of a state.
        scale: standard deviation of every component.
        shape: shape of a state.
        training: what the training came to, in words; empty if the score was given.

    Exactness: biased, as `LocalScore`: states further apart than a window are independent given those between.
    """

    window: AbstractScore
    k: int = eqx.field(static=True)
    mean: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    shape: tuple[int, ...] = eqx.field(static=True)
    training: str = eqx.field(static=True, default="")

    def over(self, shape: tuple[int, ...]) -> LearnedPrior:
        """Make the prior of paths of ``shape``, times first.

        Raises:
            ValueError: if the state has another shape, or the path is shorter than a window.
        """
        length = 2 * self.k + 1
        if not shape or shape[1:] != self.shape:
            raise ValueError(
                f"The score was learned from states of shape {self.shape}, the site has shape {shape}: expected times "
                "first, then that shape. Learn the score of this model (`fit_local`)."
            )
        if shape[0] < length:
            raise ValueError(
                f"The score sees windows of {length} times, and the path has only {shape[0]}: learn it with a smaller "
                "`k`, or use `fit_score`."
            )
        change = Affine(jnp.tile(self.mean, shape[0]), jnp.diag(jnp.tile(self.scale, shape[0])))
        return LearnedPrior(change, LocalScore(self.window, self.k, math.prod(self.shape)), shape)
