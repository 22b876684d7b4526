"""Local priors: the score of windows of a path, in units common to all times, for paths of any length."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.bijections.affine import Affine
from scoreinfer.samplers.learned_prior import LearnedPrior
from scoreinfer.score import AbstractScore, LocalScore


class Context(eqx.Module):
    """What a local score is told of every time: a site of the model, in units of its mean and standard deviation.

    Args:
        site: name of the site, of shape ``(times, *rest)``.
        mean: mean of every number of a time.
        scale: standard deviation.
    """

    site: str = eqx.field(static=True)
    mean: Float[Array, " seen"]
    scale: Float[Array, " seen"]

    def rows(self, values: Float[Array, "times *rest"]) -> Float[Array, "times seen"]:
        """Compute the rows of a path in the units of the score.

        Raises:
            ValueError: if a time has another number of values.
        """
        rows = jnp.reshape(values, (len(values), -1)).astype(jnp.float32)
        if rows.shape[1] != self.mean.size:
            raise ValueError(
                f"The context {self.site!r} had {self.mean.size} numbers for each time when the score was learned, and "
                f"has {rows.shape[1]} now."
            )
        return (rows - self.mean) / self.scale


class LocalPrior(eqx.Module):
    """A prior of paths, known by the score of their windows of 2 k + 1 times.

    Args:
        window: score of a flat window, in units in which every component has about unit variance.
        k: half-width of the window, in times.
        mean: mean of every component of a state.
        scale: standard deviation of every component.
        shape: shape of a state.
        training: what the training came to, in words; empty if the score was given.
        context: what the score is told beside the window; None: nothing.

    Exactness: biased, as `LocalScore`: states further apart than a window are independent given those between.
    """

    window: AbstractScore
    k: int = eqx.field(static=True)
    mean: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    shape: tuple[int, ...] = eqx.field(static=True)
    training: str = eqx.field(static=True, default="")
    context: Context | None = None

    def over(self, shape: tuple[int, ...], context: Float[Array, "times *rest"] | None = None) -> LearnedPrior:
        """Make the prior of paths of ``shape``, times first, given the values of the context.

        Raises:
            ValueError: if the state has another shape, the path is shorter than a window, or the context is missing,
                unexpected, or of another shape.
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
        if (context is None) != (self.context is None):
            expected = "no context" if self.context is None else f"values of the context {self.context.site!r}"
            raise ValueError(f"The score was learned with {expected}; got {'none' if context is None else 'some'}.")
        rows = None if self.context is None or context is None else self.context.rows(context)
        change = Affine(jnp.tile(self.mean, shape[0]), jnp.diag(jnp.tile(self.scale, shape[0])))
        return LearnedPrior(change, LocalScore(self.window, self.k, math.prod(self.shape), rows), shape)
