"""Resampling: draw row numbers in proportion to weights, and choose powers of weights.

Let W_i = w_i / sum_j w_j be the normalised weights. A scheme draws ``num`` row numbers. It is unbiased where row i is
drawn num W_i times on average. Schemes differ in how much the counts vary, and in which rows depend on each other.

References: Douc and Cappe 2005, arXiv cs/0507025 (schemes compared).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.montecarlo.weights import LogWeights, log_effective_share, relative_weights

NUM_HALVINGS = 40
"""Halvings of a power: 2^-40 is far below the rounding error of single precision."""

Scheme = Callable[[Key, Float[Array, " num"], int], Int[Array, " drawn"]]
"""Draws a number of rows, given log weights; one weight at least is positive."""


def systematic(key: Key, log_weight: Float[Array, " num"], num: int) -> Int[Array, " drawn"]:
    """Draw the rows that hold the levels (i + u) / num, i = 0, ..., num - 1, of the cumulated weights.

    One uniform u serves all levels. The rows come in increasing order. Equal weights keep every row, where as many
    rows are drawn as there are weights.

    Exactness: exact up to rounding: row i is drawn num W_i times on average, and this number rounded down or up each
        time. The rows depend on each other, so a run around a reference needs `conditional_multinomial`.

    References: Kitagawa 1996, JCGS 5(1).

    >>> systematic(jax.random.key(0), jnp.log(jnp.array([1.0, 2.0, 1.0])), 4).tolist()
    [0, 1, 1, 2]
    """
    offset = _positive(jax.random.uniform(key, dtype=log_weight.dtype))
    return _rows(jnp, jax.nn.softmax(log_weight), (jnp.arange(num) + offset) / num)


def multinomial(key: Key, log_weight: Float[Array, " num"], num: int) -> Int[Array, " drawn"]:
    """Draw ``num`` independent rows, row i with probability W_i.

    Exactness: exact up to rounding: the counts are multinomial, num W_i on average.
    """
    levels = _positive(jax.random.uniform(key, (num,), log_weight.dtype))
    return _rows(jnp, jax.nn.softmax(log_weight), levels)


def conditional_multinomial(key: Key, log_weight: Float[Array, " num"], num: int) -> Int[Array, " drawn"]:
    """Draw row 0 first, for certain, and the others as `multinomial` does.

    Exactness: exact: the law of independent rows, given that the first of them is row 0. It is the resampling of a run
        around a reference, which stands in row 0. The counts themselves are not unbiased.

    References: Andrieu, Doucet and Holenstein 2010, JRSS B 72(3), section 4.5 (conditional SMC).
    """
    return multinomial(key, log_weight, num).at[0].set(0)


def resample_indices(key: Key, log_weight: LogWeights, num: int) -> Int[Array, " num"]:
    """Draw ``num`` rows by systematic resampling, in random order, in double precision on the host.

    For weights of finished draws, of which there may be millions: in single precision the cumulated weights could not
    tell such small ones apart.

    Raises:
        ValueError: where no weight is positive.

    Exactness: exact: row i is drawn num W_i times on average. A weight that is NaN counts as zero.

    References: Kitagawa 1996, JCGS 5(1).
    """
    for_offset, for_order = jax.random.split(key)
    weight = _checked(log_weight)
    offset = float(_positive(jax.random.uniform(for_offset)))
    rows = _rows(np, weight, (np.arange(num) + offset) / num)
    return jax.random.permutation(for_order, jnp.asarray(rows))


def stratified_indices(log_weight: LogWeights, num: int) -> Int[np.ndarray, " num"]:
    """Choose ``num`` rows in proportion to the weights, in increasing order, without random numbers.

    The levels are (i + 1/2) / num, i = 0, ..., num - 1.

    Raises:
        ValueError: if no weight is positive.

    Exactness: consistent as the number of rows grows. The count of a row differs from num W_i by less than one.

    >>> stratified_indices(np.log([1.0, 2.0, 1.0]), 4).tolist()
    [0, 1, 1, 2]
    """
    return _rows(np, _checked(log_weight), (np.arange(num) + 0.5) / num)


def _checked(log_weight: LogWeights) -> Float[np.ndarray, " draws"]:
    """Compute relative weights, one of which must be positive."""
    weight = relative_weights(log_weight)
    if not weight.any():
        raise ValueError("No draw has a positive weight: there is nothing to resample. See the certificate's reason.")
    return weight


def _positive(uniform: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Replace 0 by the smallest step, so that no level lies in a first row of weight zero."""
    return jnp.maximum(uniform, jnp.finfo(uniform.dtype).eps)


def _rows(xp: ModuleType, weight: LogWeights, levels: Float[Array | np.ndarray, " drawn"]) -> Any:
    """Find the rows i with c_(i-1) < level c_n <= c_i, c the cumulated weights and 0 < level <= 1.

    ``xp`` is `numpy` on the host, `jax.numpy` in compiled code.
    """
    cumulative = xp.cumsum(weight)
    return xp.minimum(xp.searchsorted(cumulative, levels * cumulative[-1]), len(cumulative) - 1)


@jax.jit
def next_power(
    log_ratio: Float[Array | np.ndarray, " num"], kept_share: float | Float[Array, ""], power: float | Array = 0.0
) -> Float[Array, ""]:
    """Find the largest next power, at most 1, whose weights exp((next - power) log_ratio) are even enough.

    They are, where their effective sample size is ``kept_share`` times their number or more. The power is found by
    bisection.

    Args:
        log_ratio: log ratios of two densities; minus infinity for a weight of zero, never NaN.
        kept_share: the least effective share.
        power: the power to start from.

    References: Jasra et al. 2011, Scandinavian Journal of Statistics 38(1).

    >>> float(next_power(jnp.log(jnp.array([1.0, 1.0, 2.0])), 2 / 3))
    1.0
    """
    log_ratio = jnp.asarray(log_ratio)
    one = jnp.ones((), log_ratio.dtype)

    def enough(new):
        return log_effective_share((new - power) * log_ratio) >= jnp.log(kept_share)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        good = enough(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    found = jax.lax.fori_loop(0, NUM_HALVINGS, halve, (power * one, one))[1]
    return jnp.where(enough(one), one, found)
