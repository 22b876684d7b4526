"""Predictive checks: whether data simulated from a posterior look like the observed data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import Draws
from scoreinfer.errors import UnsupportedModel
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import pareto_smooth
from scoreinfer.problem import NO_PROBLEM, Problem

STATISTICS: dict[str, Callable[[Array], Array]] = {"mean": jnp.mean, "sd": jnp.std, "min": jnp.min, "max": jnp.max}
"""Statistics of a site that are compared. A site of size one has the mean only. Chosen by judgement."""
BATCH = 256
"""Data sets that are simulated in one compiled call. It limits the memory. Chosen by judgement."""


class Discrepancy(NamedTuple):
    """One statistic of the observed data, compared with its values on simulated data.

    Args:
        name: site and statistic.
        observed: value on the observed data.
        low: 2.5 % quantile of the simulated values.
        high: 97.5 % quantile of the simulated values.
        p_value: two-sided posterior predictive p-value.
    """

    name: str
    observed: float
    low: float
    high: float
    p_value: float


def predictive_check(key: Key, draws: Draws, num: int = 1000) -> list[Discrepancy]:
    """Compare statistics T of the observed data y with those of data y' simulated from posterior draws.

        p = min(1, 2 min(P(T(y') <= T(y)), P(T(y') >= T(y))))

    T is the mean, standard deviation, smallest and largest value of every observed site.

    Args:
        key: random key.
        draws: posterior draws. Weighted draws are resampled.
        num: number of simulated data sets.

    Returns:
        One `Discrepancy` for each statistic, sorted by name.

    Raises:
        UnsupportedModel: if data cannot be simulated from given parameters.
        ValueError: if the draws were conditioned on something that is no observed site, such as an end state.

    Exactness: conservative. The data are used twice, for the posterior and for the check. So the tail probabilities of
        a right model lie closer to one half than uniform ones.

    References: Gelman, Meng and Stern 1996, Statistica Sinica 6.
    """
    problem = draws.problem
    if problem is None or problem.simulate_observation is None:
        why = NO_PROBLEM if problem is None else problem.no_observation
        raise UnsupportedModel(
            "Predictive checks simulate data from parameters. Expected draws from the posterior of a model that can do "
            f"so, got others: {why}"
        )
    strange = sorted(draws.observed.keys() - {site.name for site in problem.observed})
    if strange:
        raise ValueError(
            f"Expected draws conditioned on observed sites only, got draws conditioned on {', '.join(strange)}. "
            "Condition on the model's observed sites."
        )
    for_rows, for_data = jax.random.split(key)
    log_weight = np.zeros(draws.num) if draws.log_weight is None else pareto_smooth(draws.log_weight)[0]
    values = draws.unconstrained[resample_indices(for_rows, log_weight, num)]
    design = {name: draws.observed[name] for name in problem.designs}
    simulated = in_batches(lambda i: _simulated(problem, for_data, design, i, values[i]), num, BATCH)
    own = _statistics(problem, draws.observed)
    return [_compare(name, float(own[name]), np.asarray(simulated[name], np.float64)) for name in sorted(own)]


@over_devices
def _simulated(problem: Problem, key: Key, design: Sites, rows: Array, values: Float[Array, "num dim"]) -> Sites:
    def one(row: Array, z: Float[Array, " dim"]) -> Sites:
        return _statistics(problem, problem.simulate_like(jax.random.fold_in(key, row), z, design))

    return map_rows(one, None)(rows, values)


def _statistics(problem: Problem, y: Sites) -> Sites:
    y = {name: value for name, value in y.items() if name not in problem.designs}
    single = {name for name, value in y.items() if jnp.size(value) == 1}
    return {
        f"{name} {statistic}": function(jnp.asarray(value, float))
        for name, value in y.items()
        for statistic, function in STATISTICS.items()
        if name not in single or statistic == "mean"
    }


def _compare(name: str, observed: float, simulated: Float[np.ndarray, " num"]) -> Discrepancy:
    low, high = np.quantile(simulated, [0.025, 0.975])
    tail = min(float(np.mean(simulated <= observed)), float(np.mean(simulated >= observed)))
    return Discrepancy(name, observed, float(low), float(high), min(1.0, 2 * tail))
