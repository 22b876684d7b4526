"""Predictive checks: whether a posterior's own simulations look like the data it was given."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import Draws
from scoreinfer.errors import UnsupportedModel
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import pareto_smooth
from scoreinfer.problem import Problem

STATISTICS: dict[str, Callable[[Array], Array]] = {"mean": jnp.mean, "sd": jnp.std, "min": jnp.min, "max": jnp.max}
BATCH = 256


class Discrepancy(NamedTuple):
    """One statistic of the data beside the same of simulated data.

    Args:
        name: site and statistic.
        observed: its value on the data.
        low: 2.5 % quantile of its simulated values.
        high: 97.5 % quantile.
        p_value: two-sided posterior predictive p-value.
    """

    name: str
    observed: float
    low: float
    high: float
    p_value: float


def predictive_check(key: Key, draws: Draws, num: int = 1000) -> list[Discrepancy]:
    """Compare statistics of the data with those of data simulated from posterior draws.

    Mean, standard deviation, smallest and largest value of every observed site. p = 2 min(P(T(y') <= T(y)),
    P(T(y') >= T(y))), at most 1.

    Args:
        key: random key.
        draws: posterior draws; weighted ones are resampled.
        num: simulated data sets.

    Raises:
        UnsupportedModel: where data cannot be simulated from given parameters.
        ValueError: where the draws are for anything else than the observed sites (an end state).

    Exactness: conservative: the data have been used twice, so p-values of a right model crowd around one half.

    References: Gelman, Meng and Stern 1996, Statistica Sinica 6.
    """
    problem = draws.problem
    if problem is None or problem.simulate_observation is None:
        why = "these draws do not know their problem" if problem is None else problem.not_simulable
        raise UnsupportedModel(f"Predictive checks simulate data from parameters: {why}")
    strange = sorted(draws.observed.keys() - {site.name for site in problem.observed})
    if strange:
        raise ValueError(f"Expected draws for what the model observes, got draws for {', '.join(strange)}.")
    for_rows, for_data = jax.random.split(key)
    log_weight = np.zeros(draws.num) if draws.log_weight is None else pareto_smooth(draws.log_weight)[0]
    values = draws.unconstrained[resample_indices(for_rows, log_weight, num)]
    simulated = in_batches(lambda i: _simulated(problem, for_data, i, values[i]), num, BATCH)
    own = _statistics(draws.observed)
    return [_compare(name, float(own[name]), np.asarray(simulated[name], np.float64)) for name in sorted(own)]


@eqx.filter_jit
def _simulated(problem: Problem, key: Key, rows: Array, values: Float[Array, "num dim"]) -> Sites:
    simulate = cast(Any, problem.simulate_observation)
    return jax.vmap(lambda row, z: _statistics(simulate(jax.random.fold_in(key, row), z)))(rows, values)


def _statistics(y: Sites) -> Sites:
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
