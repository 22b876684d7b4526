"""Models with one mode, where NUTS is at home: what ScoreSDE costs there, and whether it agrees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)
"""Effects of coaching in eight schools and their standard errors (Rubin 1981)."""


class Model(NamedTuple):
    """A model with its data, and the model that the reference is drawn from (the same posterior, easier for NUTS)."""

    name: str
    model: Callable
    data: dict[str, Any]
    reference_model: Callable


def eight_schools_centred(y=None):
    """Schools' effects around their mean, as they stand: a funnel."""
    mean, spread = numpyro.sample("mean", dist.Normal(0.0, 5.0)), numpyro.sample("spread", dist.HalfCauchy(5.0))
    effect = numpyro.sample("effect", dist.Normal(mean, spread).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(effect, ERRORS).to_event(1), obs=y)


def eight_schools(y=None):
    """Schools' effects in units of their spread."""
    mean, spread = numpyro.sample("mean", dist.Normal(0.0, 5.0)), numpyro.sample("spread", dist.HalfCauchy(5.0))
    unit = numpyro.sample("unit", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    effect = numpyro.deterministic("effect", mean + spread * unit)
    numpyro.sample("y", dist.Normal(effect, ERRORS).to_event(1), obs=y)


def logistic_regression(x, y=None):
    """Logistic regression with an intercept and unit normal coefficients."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ slope).to_event(1), obs=y)


def correlated_gaussian(covariance, y=None):
    """A correlated normal prior seen through unit noise."""
    x = numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(len(covariance)), covariance))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def stochastic_volatility(y=None, num_days=98):
    """Log volatility as an autoregression, in units of its innovations (two more parameters: 100 in all)."""
    persistence = numpyro.sample("persistence", dist.Beta(20.0, 1.5))
    size = numpyro.sample("size", dist.HalfNormal(0.5))
    unit = numpyro.sample("unit", dist.Normal(0.0, 1.0).expand([num_days]).to_event(1))

    def next_day(level, innovation):
        level = persistence * level + size * innovation
        return level, level

    _, log_volatility = jax.lax.scan(next_day, jnp.zeros(()), unit)
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(0.5 * log_volatility)).to_event(1), obs=y)


def models() -> list[Model]:
    """Make all of them, with data simulated from fixed parameters where they have none of their own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 25)).astype(np.float32)
    outcome = (rng.uniform(size=300) < 1 / (1 + np.exp(-x @ (0.7 * rng.normal(size=25))))).astype(np.int32)
    covariance = (4.0 * 0.9 ** np.abs(np.subtract.outer(np.arange(50), np.arange(50)))).astype(np.float32)
    states = np.linalg.cholesky(covariance) @ rng.normal(size=50) + rng.normal(size=50)
    log_volatility = np.zeros(98)
    for day in range(1, 98):
        log_volatility[day] = 0.95 * log_volatility[day - 1] + 0.3 * rng.normal()
    returns = np.exp(0.5 * log_volatility) * rng.normal(size=98)
    schools = {"y": EFFECTS}
    return [
        Model("eight_schools_centred", eight_schools_centred, schools, eight_schools),
        Model("eight_schools", eight_schools, schools, eight_schools),
        Model("logistic_25", logistic_regression, {"x": x, "y": outcome}, logistic_regression),
        Model("gaussian_50", correlated_gaussian, {"covariance": covariance, "y": states.astype(np.float32)},
              correlated_gaussian),
        Model("volatility_100", stochastic_volatility, {"y": returns.astype(np.float32)}, stochastic_volatility),
    ]  # fmt: skip
