"""Predictor and corrector: reverse steps, and at every level Langevin moves that need the score alone.

A corrector moves x by x' = x + h score + sqrt(2 h) e at a fixed level and accepts it by Metropolis and Hastings. The
ratio of densities comes from the score by a line integral,

    log p(x') - log p(x) = int_0^1 score(x + u (x' - x)) (x' - x) du,

with Gauss-Legendre nodes. No density is needed; a score that is no gradient gives a ratio that depends on the path.

References: Song et al. 2021, arXiv 2011.13456, algorithm 1 (predictor and corrector); Sjoberg et al. 2023, arXiv
2307.14012 (Metropolis corrections by line integrals).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.process import VE, Noising
from scoreinfer.samplers.diffusion import log_normal
from scoreinfer.samplers.reverse import levels_of, start_kernel, step_kernel
from scoreinfer.score import AbstractScore
from scoreinfer.score.guidance import moments_of

State = Float[Array, " dim"]
Scalar = Float[Array, ""]
NODES, WEIGHTS = (part.astype(np.float32) for part in np.polynomial.legendre.leggauss(4))


class FunctionScore(AbstractScore):
    """A user's own score function ``(level, x) -> grad log p(x_s)``, of x_s = x_0 + level e.

    Exactness: that of the function.

    >>> score = FunctionScore(lambda level, x: -x / (1 + level**2))
    >>> float(score.denoise(jnp.array(1.0), jnp.array([3.0]))[0])
    1.5
    """

    function: Callable[[Scalar, State], State]

    def denoise(self, level, x, y=None):
        """Compute D = x + level^2 score."""
        return x + level**2 * self.function(level, x)


class PredictorCorrector(eqx.Module):
    """Reverse steps with Langevin moves, accepted by line integrals, at every level.

    Args:
        process: the noising process, for its levels.
        num_steps: number of reverse steps, the last of which ends at level zero.
        num_corrections: moves at every level but zero.
        step: size h of a move, in units of the squared level.

    Exactness: consistent as num_corrections -> infinity, for an exact score, up to the last step: every level's moves
        leave its density invariant (up to the quadrature of the line integral), so that errors of the predictor are
        forgotten. The draws have no weights.

    Good values: 2 to 5 moves. For weights, use `scoreinfer.samplers.ReverseSDE` or `twisted`.

    >>> from scoreinfer.score import GaussianScore
    >>> score, keys = GaussianScore(jnp.ones(1), jnp.eye(1) / 4), jax.random.split(jax.random.key(0), 500)
    >>> x = jax.vmap(lambda key: PredictorCorrector(num_steps=8).sample(key, score, 1))(keys)
    >>> round(float(x.mean()), 1), round(float(x.std()), 1)
    (1.0, 0.5)
    """

    process: Noising = Noising(VE())
    num_steps: int = eqx.field(static=True, default=32)
    num_corrections: int = eqx.field(static=True, default=3)
    step: float = 0.5

    def sample(self, key: Key, score: AbstractScore, dim: int) -> State:
        """Draw one x."""
        levels = levels_of(self.process, self.num_steps)
        for_start, for_first, for_steps = jax.random.split(key, 3)
        x = start_kernel(moments_of(score, levels[0], jnp.zeros(dim)), levels[0]).draw(for_start)
        x = self.correct(for_first, score, levels[0], x)

        def step(x: State, inputs: tuple[Key, Scalar, Scalar]) -> tuple[State, None]:
            key, level, target = inputs
            for_step, for_moves = jax.random.split(key)
            x = step_kernel(moments_of(score, level, x), x, level, target).draw(for_step)
            moved = self.correct(for_moves, score, jnp.maximum(target, levels[-2]), x)
            return jnp.where(target > 0, moved, x), None

        return jax.lax.scan(step, x, (jax.random.split(for_steps, self.num_steps), levels[:-1], levels[1:]))[0]

    def correct(self, key: Key, score: AbstractScore, level: Scalar, x: State) -> State:
        """Move ``x`` at one level."""
        size = self.step * level**2

        def move(carry: tuple[State, State], key: Key) -> tuple[tuple[State, State], None]:
            x, slope = carry
            for_noise, for_accept = jax.random.split(key)
            new = x + size * slope + jnp.sqrt(2 * size) * jax.random.normal(for_noise, x.shape, x.dtype)
            new_slope = score(level, new)
            back, ahead = log_normal(x, new + size * new_slope, 2 * size), log_normal(new, x + size * slope, 2 * size)
            log_ratio = line_integral(lambda v: score(level, v), x, new) + back - ahead
            accepted = jnp.log(jax.random.uniform(for_accept)) < log_ratio
            return (jnp.where(accepted, new, x), jnp.where(accepted, new_slope, slope)), None

        return jax.lax.scan(move, (x, score(level, x)), jax.random.split(key, self.num_corrections))[0][0]


def line_integral(slope: Callable[[State], State], start: State, end: State) -> Scalar:
    """Compute the integral of a gradient along the line between two points, by four Gauss-Legendre nodes.

    Exactness: exact for gradients of polynomials of degree up to 8 along the line; else biased by the quadrature.
    """
    move = end - start
    slopes = jax.vmap(lambda u: slope(start + u * move))(jnp.asarray(0.5 * (NODES + 1)))
    return 0.5 * jnp.asarray(WEIGHTS) @ (slopes @ move)
