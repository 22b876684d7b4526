"""Score-based data assimilation: guided draws of paths, by deterministic steps and Langevin corrections.

References: Rozet and Louppe 2023, arXiv 2306.10574, algorithm 1 and section 3.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.process import Angular, Noising
from scoreinfer.samplers.reverse import levels_of
from scoreinfer.score import AbstractScore

State = Float[Array, " dim"]
Scalar = Float[Array, ""]


class CorrectedFlow(eqx.Module):
    """Steps x' = D + (r / s) (x - D) from level s to r, and at every level Langevin moves without acceptance.

    A move is x + h score + sqrt(2 h) e, with h = size / mean(score^2), at most size (1 + s^2), that of a standard
    normal x_0: of few components the mean may be near zero.

    Args:
        process: the noising process, for its levels.
        num_steps: number of steps, the last of which ends at level zero.
        num_corrections: moves at every level but zero.
        size: see above.

    Exactness: biased: by the steps, by moves that nothing accepts or rejects, and by whatever the score is biased. The
        draws have no weights. Finish them by `scoreinfer.samplers.finish`.

    Good values: 64 steps; one to four moves.

    References: Rozet and Louppe 2023, arXiv 2306.10574, algorithm 1; Song et al. 2021, arXiv 2010.02502, equation 12
        (the steps).

    >>> from scoreinfer.score import GaussianScore
    >>> score, keys = GaussianScore(jnp.ones(8), jnp.eye(8) / 4), jax.random.split(jax.random.key(0), 500)
    >>> x = jax.vmap(lambda key: CorrectedFlow(num_steps=16).sample(key, score, 8))(keys)
    >>> round(float(x.mean()), 1)
    1.0
    """

    process: Noising = Noising(Angular(level_max=20.0))
    num_steps: int = eqx.field(static=True, default=64)
    num_corrections: int = eqx.field(static=True, default=1)
    size: float = 0.25

    def sample(self, key: Key, score: AbstractScore, dim: int) -> State:
        """Draw one x."""
        levels = levels_of(self.process, self.num_steps)
        for_start, for_moves = jax.random.split(key)
        start = jnp.sqrt(levels[0] ** 2 + 1) * jax.random.normal(for_start, (dim,), levels.dtype)

        def step(x: State, inputs: tuple[Key, Scalar, Scalar]) -> tuple[State, None]:
            key, level, target = inputs
            denoised = score.denoise(level, x)
            return self._corrected(key, score, target, denoised + target / level * (x - denoised)), None

        keys = jax.random.split(for_moves, self.num_steps)
        x = jax.lax.scan(step, start, (keys[:-1], levels[:-2], levels[1:-1]))[0]
        return score.denoise(levels[-2], x)

    def _corrected(self, key: Key, score: AbstractScore, level: Scalar, x: State) -> State:
        def move(x: State, key: Key) -> tuple[State, None]:
            slope = score(level, x)
            step = self.size * jnp.minimum(1 / (slope**2).mean(), 1 + level**2)
            return x + step * slope + jnp.sqrt(2 * step) * jax.random.normal(key, x.shape, x.dtype), None

        return jax.lax.scan(move, x, jax.random.split(key, self.num_corrections))[0]
