"""A population: weighted particles, the first particles that they descend from, and the evidence so far.

Particles are weighed again and again. Where the weights have become uneven, the particles are resampled: rows are drawn
in proportion to the weights, and the weights start again at one. With w-bar_j the mean weight at the j-th resampling,
and w-bar the mean of the weights since the last one, the evidence is estimated by

    Z = (prod_j w-bar_j) w-bar.

References: Del Moral, Doucet and Jasra 2006, JRSS B 68(3); Liu and Chen 1998, JASA 93(443)
(resampling only where it is needed).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from scoreinfer._typing import Key
from scoreinfer.montecarlo.resampling import Scheme
from scoreinfer.montecarlo.weights import effective_sample_size, log_effective_share, log_mean_weight

ALWAYS = math.inf
"""The least effective share with which `resample` resamples every time."""


class Population(NamedTuple):
    """Weighted particles.

    Args:
        values: the particles; any tree of arrays, particles first.
        log_weight: their log weights since they were last resampled.
        ancestors: number of the first particle that each descends from.
        log_evidence_before: sum of the log mean weights at all resamplings.
    """

    values: Any
    log_weight: Float[Array, " num"]
    ancestors: Int[Array, " num"]
    log_evidence_before: Float[Array, ""]

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """Compute log Z (see the module)."""
        return self.log_evidence_before + log_mean_weight(self.log_weight)

    def weighed(self, log_potential: Float[Array, " num"]) -> "Population":
        """Multiply the weights by potentials; one that is NaN makes a weight of zero."""
        log_weight = self.log_weight + log_potential
        return self._replace(log_weight=jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight))


def first_population(values: PyTree, num: int) -> Population:
    """Make a population of ``num`` first particles, equally weighted."""
    return Population(values, jnp.zeros(num), jnp.arange(num), jnp.zeros(()))


def resample(
    key: Key, population: Population, scheme: Scheme, least_share: float
) -> tuple[Population, Int[Array, " num"]]:
    """Resample a population where its effective share is below ``least_share``; else leave it as it is.

    Args:
        key: random key.
        population: the particles.
        scheme: how rows are drawn.
        least_share: see above; `ALWAYS` resamples every time. Where no weight is positive, nothing is ever resampled.

    Returns:
        The population, and the row that each of its particles has come from.

    Exactness: weighted averages stay unbiased, and so does Z, where the scheme's counts are unbiased.
    """
    num, log_weight = population.log_weight.size, population.log_weight
    uneven = log_effective_share(log_weight) < jnp.log(least_share)  # False for NaN: no weight is positive
    rows = jnp.where(uneven, scheme(key, log_weight, num), jnp.arange(num))
    return Population(
        jax.tree.map(lambda leaf: leaf[rows], population.values),
        jnp.where(uneven, 0.0, log_weight),
        population.ancestors[rows],
        population.log_evidence_before + jnp.where(uneven, log_mean_weight(log_weight), 0.0),
    ), rows


def num_ancestors(ancestors: Int[Array, " num"]) -> float:
    """Compute 1 / sum_i s_i^2, s_i the share of particles that descend from first particle i.

    So many of the particles are independent.

    References: Lee and Whiteley 2018, Biometrika 105(3) (ancestors tell the variance).

    >>> num_ancestors(jnp.array([0, 0, 1, 1]))
    2.0
    """
    return effective_sample_size(np.log(np.unique(np.asarray(ancestors), return_counts=True)[1]))
