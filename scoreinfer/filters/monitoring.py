"""Whether observations scatter as they were forecast: a test that may be read at any time.

Let u_i = P(Y_i <= y_i | y before), by the filter's forecast, and z_i = Phi^{-1}(u_i). Where the forecast is right, z_i
is N(0, 1). No finite ensemble is, so the null hypothesis has tolerances: given the past, z_i is normal with mean
between -.1 and .1 and standard deviation between .9 and 1.13. For every z_i, likelihood ratios of four alternatives
have expectation one or less for all laws of the null:

    too narrow  N(0, 1.4^2) : N(0, 1.14^2)        too wide  N(0, .7^2) : N(0, .9^2)
    too low, too high  N(+-.5, 1.14^2) : N(+-.1, 1.14^2)

(e-values). The mean over the entries of one time is an e-value whatever their dependence, and the product over times a
test martingale: by Ville's inequality it ever reaches 20 with probability 1/20 at most. So does the mean of the four.

Exactness: exact for normal z within the tolerances, at every time at once. Heavy tails of z alarm too: they are meant
    to.

References: Ville 1939; Vovk and Wang 2021, Annals of Statistics 49(3) (e-values); Arnold, Henzi and Ziegel 2023, AOAS
17(3) (forecasts monitored).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, ndtri
from jaxtyping import Array, Float

from scoreinfer._program import execute
from scoreinfer._typing import Key
from scoreinfer.filters.base import Predictive
from scoreinfer.markov import Entries, Observed, Time, is_missing
from scoreinfer.montecarlo.resampling import multinomial

TOLERATED_SD, TOLERATED_MEAN = (0.9, 1.13), 0.1
"""Laws of z that count as calibrated."""
NARROW, WIDE, BIASED = (1.4, 1.14), (0.7, 0.9), (0.5, 0.1)
"""Alternative and null of each likelihood ratio."""
ALARM = 20.0
"""The alarm. By Ville's inequality its probability is at most 1/20 over all times."""
NUM_NODES = 16
"""Normal quantiles that stand for the variance a method adds."""
KINDS = "too narrowly", "too widely", "too low", "too high"
"""What the four alternatives say of the forecasts."""


def log_e_values(z: Float[Array, "*shape"]) -> Float[Array, "kinds *shape"]:
    """Compute the log e-values of the four alternatives.

    >>> log_e_values(jnp.array(3.0)).round(1).tolist()
    [1.0, -3.4, 0.8, -1.0]
    """

    def scale(alternative, null):
        return jnp.log(null / alternative) + 0.5 * z**2 * (null**-2 - alternative**-2)

    (far, near), sd = BIASED, NARROW[1]
    shift = [((far - near) * sign * z - 0.5 * (far**2 - near**2)) / sd**2 for sign in (1.0, -1.0)]
    return jnp.stack([scale(*NARROW), scale(*WIDE), *shift])


class Monitor(NamedTuple):
    """The test, time by time.

    Args:
        z: probits of the forecast's distribution function at the observations; NaN where they are missing.
        log_evidence: log of the four test martingales.
        start: number of the first observation that counts.
    """

    z: Float[np.ndarray, "times entries"]
    log_evidence: Float[np.ndarray, "kinds times"]
    start: int

    @property
    def total(self) -> Float[np.ndarray, " times"]:
        """Log of the mean of the four martingales: the test that alarms."""
        return np.asarray(logsumexp(jnp.asarray(self.log_evidence), axis=0) - np.log(len(KINDS)))

    @property
    def alarm(self) -> int | None:
        """Number of the observation at which the test first alarms; None: it never has."""
        over = self.total >= np.log(ALARM)
        return int(np.argmax(over)) if over.any() else None

    @property
    def kind(self) -> str:
        """What the alternative with the most evidence says of the forecasts."""
        time = self.alarm if self.alarm is not None else -1
        return KINDS[int(np.argmax(self.log_evidence[:, time]))]

    @property
    def scatter(self) -> float:
        """Root mean square of z since the start: how much more widely observations scatter than forecast."""
        return float(np.sqrt(np.nanmean(self.z[self.start :] ** 2)))


def monitor(z: Float[Array | np.ndarray, "times entries"], start: int = 0) -> Monitor:
    """Run the test on probits, from observation ``start`` on."""
    z = jnp.asarray(z)
    seen = ~jnp.isnan(z) & (jnp.arange(len(z)) >= start)[:, None]
    one = log_e_values(jnp.where(seen, z, 0.0))
    mean = logsumexp(jnp.where(seen, one, -jnp.inf), axis=2) - jnp.log(seen.sum(1))
    steps = jnp.where(seen.any(1), mean, 0.0)
    return Monitor(np.asarray(z), np.asarray(jnp.cumsum(steps, axis=1)), start)


def probits(
    key: Key, observed: Observed, ts: Float[Array, " times"], predictive: Predictive, y: Float[Array, "times entries"]
) -> Float[Array, "times entries"]:
    """Compute z for every entry of every observation.

    An entry of a discrete law takes a random place between P(Y < y) and P(Y <= y). Where NumPyro knows no distribution
    function, it takes a random place beside those of R simulated observations that equal it, or between its neighbours:
    u = (#{less} + U (#{equal} + 1)) / (R + 1), which is uniform for every R.

    Where the forecast is NaN, z is as low as for an impossible observation: a filter that is lost must not pass.

    Exactness: that of the forecast; the variance that the method adds is represented by 16 quantiles.
    """

    def at(inputs):
        key, t, forecast, y = inputs
        for_place, for_draws = jax.random.split(key)
        place = jax.random.uniform(for_place, y.shape)
        at_most, less = _mixture_cdf(for_draws, observed, t, forecast, y)
        u = less + place * (at_most - less)
        small = jnp.finfo(u.dtype).eps
        u = jnp.where(jnp.isnan(u), 0.0, u)
        return jnp.where(is_missing(y), jnp.nan, ndtri(jnp.clip(u, small, 1.0 - small)))

    return execute(lambda *inputs: jax.lax.map(at, inputs), jax.random.split(key, len(ts)), ts, predictive, y)


def spread(forecast: Predictive) -> tuple[Float[Array, "rows entries"], Float[Array, " rows"]]:
    """Write the forecast as equally shaped rows u and their log weights: members times scales times quantiles."""
    node = ndtri((jnp.arange(NUM_NODES) + 0.5) / NUM_NODES)
    node = node / jnp.sqrt(jnp.mean(node**2))
    u = forecast.u[:, None, None] + jnp.sqrt(forecast.added)[None, :, None] * node[:, None]
    log_weight = jax.nn.log_softmax(forecast.log_weight)[:, None] + jax.nn.log_softmax(forecast.log_share)
    rows = jnp.broadcast_to(log_weight[..., None] - jnp.log(NUM_NODES), u.shape[:3])
    return u.reshape(-1, u.shape[-1]), rows.ravel()


def _mixture_cdf(key: Key, observed: Observed, t: Time, forecast: Predictive, y: Entries) -> tuple[Entries, Entries]:
    """Compute P(Y <= y) and P(Y < y) of the forecast, or the ends of y's place among draws of it."""
    u, log_weight = spread(forecast)
    weight = jnp.exp(log_weight)
    average: Callable[[Array], Array] = lambda values: weight @ values  # noqa: E731
    try:
        at_most = average(jax.vmap(observed.cdf, (None, 0, None))(t, u, y))
    except NotImplementedError:
        return _place_among_draws(key, observed, t, u, log_weight, y)
    mass = average(jnp.exp(jax.vmap(observed.log_likelihood, (None, 0, None))(t, u, y)))
    return at_most, at_most - jnp.where(observed.discrete(t), mass, 0.0)


def _place_among_draws(
    key: Key,
    observed: Observed,
    t: Time,
    u: Float[Array, "rows entries"],
    log_weight: Float[Array, " rows"],
    y: Entries,
) -> tuple[Entries, Entries]:
    """Compute (#{draws <= y} + 1) / (R + 1) and #{draws < y} / (R + 1) for R independent draws of the forecast."""
    for_rows, for_draws = jax.random.split(key)
    num = len(u)
    keys, rows = jax.random.split(for_draws, num), multinomial(for_rows, log_weight, num)
    draws = jax.vmap(observed.sample, (0, None, 0))(keys, t, u[rows])
    return ((draws <= y).sum(0) + 1) / (num + 1), (draws < y).sum(0) / (num + 1)
