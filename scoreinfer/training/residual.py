"""The denoising loss of scores that begin as a Gaussian's (`scoreinfer.score.residual`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.score.residual import ResidualScore
from scoreinfer.training.losses import NoiseLevels

LEVELS = NoiseLevels(-1.5, 2.0)
"""Levels of the loss: half of them below 0.22, a twentieth below 0.01. Chosen by judgement: steps of a path are a
hundred times smaller than the path."""


def residual_loss(
    score: ResidualScore, draws: Float[Array, "num dim"], context: Float[Array, "num seen"], key: Key
) -> Float[Array, ""]:
    """Compute the mean squared error of F, in units of what the Gaussian leaves in every direction.

    The minimiser is the denoiser E[x_0 | x_s, context], whatever the Gaussian.

    References: Karras et al. 2022, arXiv 2206.00364, equation 8 (preconditioned loss).
    """
    for_level, for_noise = jax.random.split(key)
    level = LEVELS.sample(for_level, len(draws))
    z = score.split(draws)
    noisy = z + level[:, None] * jax.random.normal(for_noise, z.shape, jnp.float32)
    keep, out, unit = score.scales(level)
    found = jax.vmap(score.network)(unit * noisy, jnp.log(level), context)
    return (((z - keep * noisy) / out - found) ** 2).mean()
