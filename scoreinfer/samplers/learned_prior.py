"""Learned priors: a score in whitened units, and the flow that makes draws of it from standard normal noise."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine, identity
from scoreinfer.process import VE, Angular, Noising
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.reverse import DiscretisedPrior
from scoreinfer.score import AbstractScore

State = Float[Array, " dim"]
NUM_STEPS = 16
"""Heun steps of the flow. Chosen by judgement (see `ProbabilityFlow`)."""
MAX_DENSITY = 32
"""Most components for which the flow's density is computed: every step takes a Jacobian. Chosen by judgement."""


class LearnedPrior(eqx.Module):
    """A distribution given by a score: x = change(u), u the end of a probability flow.

    The flow, with its finite number of Heun steps, *is* the prior: draws, density and the NumPyro site
    (`scoreinfer.score_prior`) are of the same distribution.

    Args:
        change: from the units of the score, in which x has about unit variance, to those of x.
        score: the score of u.
        shape: shape of x.
        flow: the flow.
        training: what the training came to, in words; empty if the score was given.

    Exactness: draws and density are exact for the flow; the flow is as near to the distribution that the score was
        learned from as training and steps allow.
    """

    change: Affine
    score: AbstractScore
    shape: tuple[int, ...] = eqx.field(static=True)
    flow: ProbabilityFlow = ProbabilityFlow(Noising(Angular(level_max=20.0)), NUM_STEPS)
    training: str = eqx.field(static=True, default="")

    def __check_init__(self) -> None:
        dim = math.prod(self.shape)
        try:
            found = jax.eval_shape(self.score.denoise, jnp.ones(()), jnp.zeros(dim)).shape
        except (TypeError, ValueError) as error:  # shapes that do not fit
            raise ValueError(_wrong_shape(self.shape, error)) from error
        if found != (dim,) or self.change.mean.shape != (dim,):
            raise ValueError(_wrong_shape(self.shape, f"it returns shape {found}"))

    @property
    def dim(self) -> int:
        """Number of components of x."""
        return self.change.mean.size

    def forward(self, noise: State) -> State:
        """Compute x, flat, from standard normal noise."""
        return self.change.forward(self.flow.transport(self.score, noise))

    def inverse(self, x: State) -> tuple[State, Float[Array, ""]]:
        """Compute the noise behind x, and the log density of x; minus infinity where no noise is found.

        Raises:
            ValueError: if x has more than `MAX_DENSITY` components.
        """
        if self.dim > MAX_DENSITY:
            raise ValueError(
                f"The density of a learned prior takes a Jacobian of every step, up to {MAX_DENSITY} components; this "
                f"one has {self.dim}. Use `score_prior`, which needs no density."
            )
        u = self.change.inverse(x)
        noise, log_density = self.flow.invert(self.score, u)
        return noise, log_density - self.change.log_det(u)

    def log_density(self, x: State) -> Float[Array, ""]:
        """Compute the log density of x."""
        return self.inverse(x)[1]

    def sample(self, key: Key, num: int) -> Float[Array, "num *shape"]:
        """Draw ``num`` values of x."""
        return _draw(key, self, num)

    def discretised(self, process: Noising, num_steps: int) -> DiscretisedPrior:
        """Make the prior of the reverse SDE with these steps, in the units of the score."""
        return DiscretisedPrior(self.score, process, num_steps, self.dim)


def _wrong_shape(shape: tuple[int, ...], why: object) -> str:
    return (
        f"The score of x of shape {shape} must map {math.prod(shape)} numbers to as many: made for another shape? {why}"
    )


@eqx.filter_jit
def _draw(key: Key, prior: LearnedPrior, num: int) -> Float[Array, "num *shape"]:
    noise = jax.random.normal(key, (num, prior.dim), jnp.float32)
    return jax.vmap(prior.forward)(noise).reshape(num, *prior.shape)


def as_prior(score: AbstractScore | LearnedPrior, shape: tuple[int, ...]) -> LearnedPrior:
    """Make a learned prior of a user's own score of x, or check the shape of one.

    Raises:
        ValueError: if the score was made for another shape.
    """
    if isinstance(score, LearnedPrior):
        if score.shape != shape:
            raise ValueError(f"The prior was learned from draws of shape {score.shape}, the site has shape {shape}.")
        return score
    return LearnedPrior(identity(math.prod(shape)), score, shape, ProbabilityFlow(Noising(VE(level_max=100.0)), 64))
