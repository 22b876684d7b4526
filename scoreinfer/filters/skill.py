"""Skill: how near forecasts of observations are, beside forecasts that know no model.

A calibrated forecast may still say little: the climate's own distribution is calibrated. The continuous ranked
probability score of a forecast F of y, E|Y - y| - E|Y - Y'| / 2, rewards calibration and sharpness together.

References: Gneiting and Raftery 2007, JASA 102(477); Ferro 2014, QJRMS 140 (the score of an ensemble, without bias).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._program import execute
from scoreinfer._typing import Key
from scoreinfer.filters.base import Predictive
from scoreinfer.filters.monitoring import spread
from scoreinfer.markov import Observed

NUM_DRAWS = 100
"""Draws of a forecast."""
CLIMATE, PERSISTENCE = "climatology", "persistence"


def crps(draws: Float[Array, "num *shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute the fair score of an ensemble: the average over all ensembles of this size is that of their law.

    >>> float(crps(jnp.array([0.0, 2.0]), jnp.array(1.0)))
    0.0
    """
    num = draws.shape[0]
    rank = jnp.arange(num).reshape(-1, *[1] * y.ndim)
    pairs = 2.0 * ((2 * rank - num + 1) * jnp.sort(draws, axis=0)).sum(0) / (num * (num - 1))
    return jnp.abs(draws - y).mean(0) - 0.5 * pairs


def forecast_score(
    key: Key, observed: Observed, ts: Float[Array, " times"], predictive: Predictive, y: Float[Array, "times entries"]
) -> Float[Array, "times entries"]:
    """Score a filter's forecasts of all observations by 100 draws of each; NaN where an entry is missing."""

    def at(inputs):
        key, t, forecast, y = inputs
        for_rows, for_draws = jax.random.split(key)
        u, log_weight = spread(forecast)
        rows = jax.random.categorical(for_rows, log_weight, shape=(NUM_DRAWS,))
        return crps(jax.vmap(observed.sample, (0, None, 0))(jax.random.split(for_draws, NUM_DRAWS), t, u[rows]), y)

    return execute(lambda *inputs: jax.lax.map(at, inputs), jax.random.split(key, len(ts)), ts, predictive, y)


def reference_scores(y: Float[Array, "times entries"]) -> dict[str, Float[Array, "times entries"]]:
    """Score two forecasts without a model: each entry's own distribution, and its last value plus usual changes.

    Both know the whole series, the future included, and so are hard to beat.
    """
    level = (jnp.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    change = jnp.concatenate([jnp.full_like(y[:1], jnp.nan), y[1:] - y[:-1]])
    usual = jnp.nanquantile(y, level, axis=0)[:, None]
    last = (y - change) + jnp.nanquantile(change, level, axis=0)[:, None]
    return {CLIMATE: crps(jnp.broadcast_to(usual, last.shape), y), PERSISTENCE: crps(last, y)}
