"""Resampling: row numbers by weight, and the powers of weights that keep enough of an effective sample size."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.montecarlo.weights import LogWeights, effective_sample_size, log_effective_share, relative_weights


def tempering_power(log_weight: np.ndarray, floor: float) -> float:
    """Find the largest power of the weights, at most 1, whose effective sample size is at least ``floor``.

    >>> tempering_power(np.log([1.0, 1.0, 2.0]), 2.0)
    1.0
    """
    low, high = 0.0, 1.0
    if effective_sample_size(log_weight) >= floor:
        return 1.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effective_sample_size(middle * log_weight) >= floor else (low, middle)
    return low


def resample_indices(key: Key, log_weight: LogWeights, num: int) -> Int[Array, " num"]:
    """Draw ``num`` row numbers in proportion to the weights: systematic resampling in random order.

    Exactness: every row's expected count is exactly ``num`` times its normalised weight.

    References: Kitagawa 1996; Douc and Cappe 2005, arXiv cs/0507025.
    """
    for_offset, for_order = jax.random.split(key)
    cumulative = np.cumsum(relative_weights(log_weight))
    if not cumulative[-1] > 0:
        raise ValueError("No draw has a positive weight: there is nothing to resample. See the certificate's reason.")
    points = (np.arange(num) + float(jax.random.uniform(for_offset))) / num * cumulative[-1]
    rows = np.minimum(np.searchsorted(cumulative, points, side="right"), len(cumulative) - 1)
    return jax.random.permutation(for_order, jnp.asarray(rows))


def next_power(power: Float[Array, ""], log_ratio: Float[Array, " num"], kept_share: float) -> Float[Array, ""]:
    """Find the largest next power, at most 1, that keeps a share of the effective sample size (by bisection)."""

    def enough(new):
        return log_effective_share((new - power) * log_ratio) >= jnp.log(kept_share)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        good = enough(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    one = jnp.ones_like(power)
    return jnp.where(enough(one), one, jax.lax.fori_loop(0, 40, halve, (power, one))[1])


def resample(key: Key, log_weight: Float[Array, " num"]) -> Int[Array, " num"]:
    """Draw as many row numbers as there are weights: systematic, in order, so that equal weights keep every row."""
    num = log_weight.size
    cumulative = jnp.cumsum(jax.nn.softmax(log_weight))
    points = (jnp.arange(num) + jax.random.uniform(key, dtype=cumulative.dtype)) / num * cumulative[-1]
    return jnp.minimum(jnp.searchsorted(cumulative, points), num - 1)


def stratified_indices(log_weight: LogWeights, num: int) -> Int[np.ndarray, " num"]:
    """Choose ``num`` row numbers in proportion to the weights, in order, without random numbers.

    Row i stands there floor or ceil of ``num`` w_i times, or one more or less.

    Exactness: consistent as the number of rows grows; biased by at most one copy of each row.

    >>> stratified_indices(np.log([1.0, 2.0, 1.0]), 4).tolist()
    [0, 1, 1, 2]
    """
    cumulative = np.cumsum(relative_weights(log_weight))
    if not cumulative[-1] > 0:
        raise ValueError("No draw has a positive weight: there is nothing to resample. See the certificate's reason.")
    points = (np.arange(num) + 0.5) / num * cumulative[-1]
    return np.minimum(np.searchsorted(cumulative, points, side="right"), len(cumulative) - 1)
