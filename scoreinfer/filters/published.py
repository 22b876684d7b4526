"""The ensemble score filter as published: a heuristic, kept for comparison."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.filters.base import AbstractFilter, Analysis, EvidenceKind, predict
from scoreinfer.markov import State
from scoreinfer.score.ensemble import PublishedScore

LARGEST_SCORE = 1000.0
"""Components of the likelihood's score are cut here, as in the authors' code."""


class EnSF(AbstractFilter):
    """The ensemble score filter of Bao, Zhang and Zhang 2024, as its authors run it.

    From standard noise, member j follows the reverse SDE of `PublishedScore` around forecast member j, by Euler's
    method with ``num_steps`` steps.

    Args:
        eps_alpha: a of the schedule.
        eps_beta: b of the schedule.
        num_steps: number of Euler steps.

    Exactness: heuristic: as the steps grow it returns the forecast, whatever the observation; components that are not
        observed are never updated. It has no evidence: that is NaN.

    Good values: those of the authors, which depend on each other and on the noise.

    References: Bao, Zhang and Zhang 2024, CMAME 432, arXiv 2309.00983, algorithm 1.
    """

    log_evidence_kind: ClassVar[EvidenceKind] = "none"
    eps_alpha: float = eqx.field(static=True, default=0.5)
    eps_beta: float = eqx.field(static=True, default=0.025)
    num_steps: int = eqx.field(static=True, default=200)

    def analyse(self, key, memory, t, members, observed, y):
        """Run every member backwards."""

        def log_likelihood(x):
            return observed.log_likelihood(t, observed.predict(t, x), y).sum()

        for_start, for_steps = jax.random.split(key)
        start = jax.random.normal(for_start, members.x.shape)
        start = (start - start.mean(0)) / start.std(0, ddof=1)
        keys = jax.random.split(for_steps, members.x.shape[0])
        x = jax.vmap(lambda key, z, point: self._backwards(key, z, self.score(point, log_likelihood)))(
            keys, start, members.x
        )
        return memory, Analysis(members._replace(x=x), jnp.full((), jnp.nan), predict(observed, t, members))

    def score(self, point: State, log_likelihood: Callable[[State], Float[Array, ""]]) -> PublishedScore:
        """Make the score that one member follows."""
        return PublishedScore(point, log_likelihood, self.eps_alpha, self.eps_beta)

    def _backwards(self, key: Key, z: State, score: PublishedScore) -> State:
        """Follow dz = (f z - g^2 score) dt + g dW from t = 1 to 0, f = d log alpha, g^2 = d beta^2 - 2 f beta^2."""
        step = 1.0 / self.num_steps

        def move(z, inputs):
            key, t = inputs
            pull = (self.eps_alpha - 1.0) / score.alpha(t)
            square = 1.0 - self.eps_beta - 2.0 * pull * score.square(t)
            drift = pull * z - square * jnp.clip(score.at(t, z), -LARGEST_SCORE, LARGEST_SCORE)
            return z - step * drift + jnp.sqrt(step * square) * jax.random.normal(key, z.shape, z.dtype), None

        times = 1.0 - step * jnp.arange(self.num_steps, dtype=z.dtype)
        return jax.lax.scan(move, z, (jax.random.split(key, self.num_steps), times))[0]
