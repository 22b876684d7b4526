"""Twins: is a filter calibrated on worlds that its own model simulates?

Truth and observations of every world are drawn from the model. Then the rank of the truth among the analysed members is
uniform, if the members represent p(x_k | y_1, ..., y_k). Nothing is said of real data: these may come from elsewhere.

References: Talagrand et al. 1997, ECMWF workshop on predictability (rank histograms); Talts et al. 2018, arXiv
1804.06788 (calibration by simulation).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

from scoreinfer._memory import map_rows
from scoreinfer._program import execute
from scoreinfer._typing import Key
from scoreinfer.filters import cycle
from scoreinfer.filters.base import AbstractFilter, Members
from scoreinfer.model.series import read_series
from scoreinfer.model.states import Series, StateSpace

LEVEL = 0.9
"""Nominal coverage."""
COVERAGE, RATIO = (0.87, 0.93), (0.9, 1.15)
"""Coverage of 90 % intervals, and spread over error, of a calibrated filter. Chosen by judgement."""
Verdict = Literal["certified", "not certified", "not decided"]
CERTIFIED, REFUSED, UNDECIDED = get_args(Verdict)
"""What worlds say of a filter; not decided: there are too few of them."""


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
        """95 % interval of the mean coverage. Worlds are independent; points within one are not."""
        return _interval(float(self.coverage.mean()), self.coverage)

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """95 % interval of spread over error, by the delta method for its logarithm."""
        share = self.spread**2 / np.mean(self.spread**2) - self.error**2 / np.mean(self.error**2)
        low, high = _interval(np.log(self.ratio), 0.5 * share)
        return float(np.exp(low)), float(np.exp(high))

    @property
    def verdict(self) -> Verdict:
        """Decide by the intervals over worlds.

        Refused: the filter is lost, or an interval lies outside of its bounds. Certified: neither does, and both are
        narrower than their bounds. Otherwise there are too few worlds to tell.
        """
        if not (np.isfinite(self.error).all() and 0.0 < self.ratio < np.inf):
            return REFUSED
        pairs = ((self.interval, COVERAGE), (self.ratio_interval, RATIO))
        if any(found[1] < bound[0] or found[0] > bound[1] for found, bound in pairs):
            return REFUSED
        resolved = all(found[1] - found[0] <= bound[1] - bound[0] for found, bound in pairs)
        return CERTIFIED if resolved else UNDECIDED

    @property
    def certified(self) -> bool:
        """Whether coverage and spread over error may lie within their bounds, and the worlds suffice to say so."""
        return self.verdict == CERTIFIED

    @property
    def reason(self) -> str:
        """Say what the worlds show."""
        lost = int((~np.isfinite(self.error)).sum())
        if lost:
            return f"the filter is lost in {lost} of {len(self.error)} worlds of its own model"
        if not 0.0 < self.ratio < np.inf:
            return f"spread is {self.ratio:g} times the error: the members, or the truths, are all the same"
        (low, high), (least, most) = self.interval, self.ratio_interval
        found = (
            f"90 % intervals hold {100 * self.coverage.mean():.0f} % of the truths ({100 * low:.0f} to "
            f"{min(100 * high, 100):.0f} %) and spread is {self.ratio:.2f} times the error "
            f"({least:.2f} to {most:.2f}), in {len(self.error)} worlds"
        )
        return (
            found
            + {
                CERTIFIED: "",
                REFUSED: ": outside of 87 to 93 % or .9 to 1.15",
                UNDECIDED: ": too few worlds to tell, so raise `num_experiments`",
            }[self.verdict]
        )


def _interval(centre: float, worlds: Float[np.ndarray, " worlds"]) -> tuple[float, float]:
    """Compute Student's 95 % interval around a mean over worlds."""
    num = len(worlds)
    half = stats.t.ppf(0.975, num - 1) * worlds.std(ddof=1) / np.sqrt(num)
    return float(centre - half), float(centre + half)


def simulate(key: Key, series: Series) -> tuple[Float[Array, "times dim"], Float[Array, "times entries"]]:
    """Draw a truth and its observations at the times of a series; what is missing there is missing here."""
    model = series.model

    def step(now, inputs):
        (t0, x), (key, t1, y) = now, inputs
        for_move, for_noise = jax.random.split(key)
        x = jnp.where(t1 > t0, model.transition(for_move, t0, t1, x), x)
        new = model.observed.simulate(for_noise, t1, x)
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
        num_experiments: number of worlds. How many decide depends on how much one world says.
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

    found = execute(map_rows(world, None), jax.random.split(key, num_experiments))
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
