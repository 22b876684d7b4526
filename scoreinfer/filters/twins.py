"""Twins: is a filter calibrated on worlds that its own model simulates?

Truth and observations of every world are drawn from the model. Then the rank of the truth among the analysed members is
uniform, if the members represent p(x_k | y_1, ..., y_k). Nothing is said of real data: these may come from elsewhere.

References: Talagrand et al. 1997, ECMWF workshop on predictability (rank histograms); Talts et al. 2018, arXiv
1804.06788 (calibration by simulation).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.filters import cycle
from scoreinfer.filters.base import AbstractFilter, Members
from scoreinfer.model.series import read_series
from scoreinfer.model.states import Series, StateSpace

LEVEL = 0.9
"""Nominal coverage."""
COVERAGE, RATIO = (0.87, 0.93), (0.9, 1.15)
"""Coverage of 90 % intervals, and spread over error, of a calibrated filter. Chosen by judgement."""


class Twins(NamedTuple):
    """What a filter does on simulated worlds, one number for each world, after spin-up.

    Args:
        coverage: share of the truths inside the central 90 % of the members.
        spread: root mean square of the members' standard deviation.
        error: root mean square error of the members' mean.
        dim: number of components of the state.
        num_members: number of members.
    """

    coverage: Float[np.ndarray, " worlds"]
    spread: Float[np.ndarray, " worlds"]
    error: Float[np.ndarray, " worlds"]
    dim: int
    num_members: int

    @property
    def ratio(self) -> float:
        """Spread over error, over all worlds."""
        return float(np.sqrt(np.mean(self.spread**2) / np.mean(self.error**2)))

    @property
    def interval(self) -> tuple[float, float]:
        """Two standard errors around the mean coverage. Worlds are independent; points within one are not."""
        mean, error = self.coverage.mean(), self.coverage.std(ddof=1) / np.sqrt(len(self.coverage))
        return float(mean - 2 * error), float(mean + 2 * error)

    @property
    def certified(self) -> bool:
        """Whether coverage and spread over error are within their bounds, in all worlds that ended."""
        low, high = COVERAGE
        return bool(
            np.isfinite(self.error).all() and low <= self.coverage.mean() <= high and RATIO[0] <= self.ratio <= RATIO[1]
        )

    @property
    def reason(self) -> str:
        """Say what the worlds show."""
        lost = int((~np.isfinite(self.error)).sum())
        if lost:
            return f"the filter is lost in {lost} of {len(self.error)} worlds of its own model"
        low, high = self.interval
        found = (
            f"90 % intervals hold {100 * self.coverage.mean():.0f} % of the truths ({100 * low:.0f} to "
            f"{min(100 * high, 100):.0f} %) and spread is {self.ratio:.2f} times the error, in {len(self.error)} worlds"
        )
        return found if self.certified else f"{found}: outside of 87 to 93 % or .9 to 1.15"


def simulate(key: Key, series: Series) -> tuple[Float[Array, "times dim"], Float[Array, "times entries"]]:
    """Draw a truth and its observations at the times of a series; what is missing there is missing here."""
    model = series.model

    def step(now, inputs):
        (t0, x), (key, t1, y) = now, inputs
        for_move, for_noise = jax.random.split(key)
        x = jnp.where(t1 > t0, model.transition(for_move, t0, t1, x), x)
        new = model.observed.sample(for_noise, t1, model.observed.predict(t1, x))
        return (t1, x), (x, jnp.where(jnp.isnan(y), jnp.nan, new))

    for_start, for_steps = jax.random.split(key)
    keys = jax.random.split(for_steps, series.ts.size)
    first = series.start, model.initial(for_start)
    return jax.lax.scan(step, first, (keys, series.ts, series.y))[1]


def twin(
    key: Key,
    model: Callable[..., Any] | StateSpace,
    site: str | None = None,
    *args: Any,
    method: AbstractFilter,
    num_members: int,
    num_experiments: int = 20,
    spin_up: int = 0,
    **kwargs: Any,
) -> Twins:
    """Filter worlds that the model simulates, and compare the members with the truths.

    Args:
        key: random key.
        model: the NumPyro model, or a state space, as `filter` takes it.
        site: the site of the state.
        *args: the model's arguments.
        method: the method.
        num_members: number of members.
        num_experiments: number of worlds.
        spin_up: observations that do not count.
        **kwargs: the model's keyword arguments. Of observations, only times, shape and missing entries matter.

    Returns:
        Coverage, spread and error in every world.

    Raises:
        ValueError: if no observation counts, there is one world only, or the state space does not fit.

    Exactness: a filter that draws from the posterior covers 90 % up to chance, for any number of equally weighted
        members.
    """
    series = read_series(model, site, args, kwargs)
    method.check(series.model)
    if num_experiments < 2 or spin_up >= series.ts.size:
        raise ValueError(
            f"`num_experiments` must be at least 2 and `spin_up` below the number of times, got {num_experiments} and "
            f"{spin_up} of {series.ts.size}. Simulate more worlds, or let more observations count."
        )

    def world(key: Key) -> tuple[Array, Array, Array]:
        for_truth, for_start, for_run, for_rank = jax.random.split(key, 4)
        truth, data = simulate(for_truth, series)
        now = cycle.begin(for_start, method, series.model, num_members, series.start)
        _, cycles = cycle.run(for_run, method, series.model, now, series.ts, data)
        inside, spread, off = _compared(for_rank, cycles.analysis.members, truth)
        spread, off = jnp.sqrt(jnp.mean(spread[spin_up:])), jnp.sqrt(jnp.mean(off[spin_up:]))
        return inside[spin_up:].mean(), spread, off

    found = jax.jit(jax.vmap(world))(jax.random.split(key, num_experiments))
    coverage, spread, error = (np.asarray(part, np.float64) for part in found)
    return Twins(coverage, spread, error, series.model.dim, num_members)


def _compared(
    key: Key, members: Members, truth: Float[Array, "times dim"]
) -> tuple[Float[Array, "times dim"], Float[Array, "times dim"], Float[Array, "times dim"]]:
    """Compute whether truths lie in the central 90 %, the members' variance, and the squared error of their mean."""
    weight, num = jax.nn.softmax(members.log_weight, axis=1)[..., None], members.log_weight.shape[1]
    below = (weight * (members.x < truth[:, None])).sum(1)
    rank = (num * below + jax.random.uniform(key, below.shape)) / (num + 1)
    mean = (weight * members.x).sum(1)
    variance = (weight * (members.x - mean[:, None]) ** 2).sum(1) * num / (num - 1)
    return (jnp.abs(rank - 0.5) < 0.5 * LEVEL) * 1.0, variance, (mean - truth) ** 2
