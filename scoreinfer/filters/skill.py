"""Skill: how near forecasts of observations are, beside forecasts that know no model.

A calibrated forecast may still say little: the climate's own distribution is calibrated. The continuous ranked
probability score of a forecast F of y, E|Y - y| - E|Y - Y'| / 2, rewards calibration and sharpness together. So does
the log score, log f(y) with the forecast's density f; it punishes most what the forecast all but excluded.

References: Gneiting and Raftery 2007, JASA 102(477); Ferro 2014, QJRMS 140 (the score of an ensemble, without bias).
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp, ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float

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


def forecast_log_score(
    observed: Observed, ts: Float[Array, " times"], predictive: Predictive, y: Float[Array, "times entries"]
) -> Float[Array, "times entries"]:
    """Compute log p(y_i | observations before) of every entry, by a filter's forecasts; NaN where it is missing."""

    def at(inputs):
        t, forecast, y = inputs
        u, log_weight = spread(forecast)
        log_density = logsumexp(
            log_weight[:, None] + jax.vmap(observed.log_likelihood, (None, 0, None))(t, u, y), axis=0
        )
        return jnp.where(jnp.isnan(y), jnp.nan, log_density)

    return execute(lambda *inputs: jax.lax.map(at, inputs), ts, predictive, y)


def reference_log_scores(
    y: Float[Array, "times entries"], discrete: Bool[Array, " entries"]
) -> dict[str, Float[Array, "times entries"]]:
    """Compute the log scores of the two forecasts of `reference_scores`, each as a normal law of their mean and spread.

    For a discrete entry it is the probability of the interval of length one around y.
    """
    change = jnp.concatenate([jnp.full_like(y[:1], jnp.nan), y[1:] - y[:-1]])

    def log_density(value):
        tiny = jnp.finfo(y.dtype).tiny
        mean, sd = jnp.nanmean(value, axis=0), jnp.nanstd(value, axis=0) + tiny
        low, high = (ndtr((value - mean + side) / sd) for side in (-0.5, 0.5))
        return jnp.where(discrete, jnp.log(jnp.maximum(high - low, tiny)), norm.logpdf(value, mean, sd))

    return {CLIMATE: log_density(y), PERSISTENCE: log_density(change)}


def reference_scores(y: Float[Array, "times entries"]) -> dict[str, Float[Array, "times entries"]]:
    """Score two forecasts without a model: each entry's own distribution, and its last value plus usual changes.

    Both know the whole series, the future included, and so are hard to beat.
    """
    level = (jnp.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    change = jnp.concatenate([jnp.full_like(y[:1], jnp.nan), y[1:] - y[:-1]])
    usual = jnp.nanquantile(y, level, axis=0)[:, None]
    last = (y - change) + jnp.nanquantile(change, level, axis=0)[:, None]
    return {CLIMATE: crps(jnp.broadcast_to(usual, last.shape), y), PERSISTENCE: crps(last, y)}
