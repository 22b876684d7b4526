"""Resampling: unbiased counts by every scheme, one population's bookkeeping, and the bisection of powers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from scoreinfer.montecarlo.population import ALWAYS, first_population, num_ancestors, resample
from scoreinfer.montecarlo.resampling import (
    conditional_multinomial,
    multinomial,
    next_power,
    resample_indices,
    systematic,
)

WEIGHT = np.array([0.0, 1.0, 3.5, 0.0, 0.5, 0.0])
SHARE = WEIGHT / WEIGHT.sum()
RUNS, SIGMAS = 20_000, 5


def counts(scheme, num):
    """Counts of every row, in many runs."""
    keys = jax.random.split(jax.random.key(0), RUNS)
    rows = jax.jit(jax.vmap(lambda key: scheme(key, jnp.log(jnp.asarray(WEIGHT)), num)))(keys)
    return np.asarray(rows), (np.asarray(rows)[..., None] == np.arange(len(WEIGHT))).sum(1)


@pytest.mark.parametrize("num", [4, 6, 11])
@pytest.mark.parametrize("scheme", [systematic, multinomial])
def test_counts_are_unbiased(scheme, num):
    """On average num W_i, also where other than as many rows are drawn as there are weights."""
    _, count = counts(scheme, num)
    error = count.std(0) / np.sqrt(RUNS)
    assert np.all(np.abs(count.mean(0) - num * SHARE) <= SIGMAS * error + 1e-6)
    assert not count[:, WEIGHT == 0].any()


def test_systematic_counts_are_rounded_and_rows_increase():
    rows, count = counts(systematic, 6)
    assert np.all(np.abs(count - 6 * SHARE) < 1 + 1e-5) and np.all(np.diff(rows) >= 0)
    np.testing.assert_array_equal(systematic(jax.random.key(0), jnp.zeros(100), 100), np.arange(100))


def test_multinomial_rows_are_independent():
    """Variances and covariances of the counts are those of the multinomial distribution."""
    _, count = counts(multinomial, 6)
    exact = 6 * (np.diag(SHARE) - np.outer(SHARE, SHARE))
    assert np.abs(np.cov(count.T) - exact).max() < 0.1


def test_reference_is_kept_and_the_others_are_free():
    rows, _ = counts(conditional_multinomial, 5)
    assert not rows[:, 0].any()  # although its weight is zero
    free = (rows[:, 1:, None] == np.arange(len(WEIGHT))).mean(1)
    assert np.all(np.abs(free.mean(0) - SHARE) <= SIGMAS * free.std(0) / np.sqrt(RUNS) + 1e-6)


def test_resampling_on_the_host_is_in_proportion_and_in_random_order():
    log_weight = jnp.log(jnp.array([0.1, 0.0, 0.6, 0.3]))
    rows = np.asarray(resample_indices(jax.random.key(1), log_weight, 1000))
    assert np.all(np.abs(np.bincount(rows, minlength=4) - np.array([100, 0, 600, 300])) <= 1)
    assert stats.spearmanr(rows, np.arange(1000)).pvalue > 1e-3
    with pytest.raises(ValueError, match="nothing to resample"):
        resample_indices(jax.random.key(1), jnp.full(3, -jnp.inf), 10)


def test_even_weights_are_left_alone_and_uneven_ones_are_not():
    """Whatever is done, weighted counts and evidence are accounted for; of dead populations nothing is resampled."""
    key, log_weight = jax.random.key(0), jnp.log(jnp.array([1.0, 2.0, 6.0, 1.0]))
    population = first_population(jnp.arange(4.0), 4).weighed(log_weight)  # effective share 100 / 42 / 4 = .595
    for least_share in (0.0, 0.59):
        kept, rows = resample(key, population, systematic, least_share)
        assert rows.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(kept.log_weight, log_weight)
    for least_share in (0.6, ALWAYS):
        drawn, rows = resample(key, population, systematic, least_share)
        assert drawn.ancestors.tolist() == rows.tolist() == drawn.values.tolist()
        assert np.bincount(rows, minlength=4)[2] in (2, 3) and not drawn.log_weight.any()
        assert drawn.log_evidence_before == pytest.approx(np.log(2.5))
        assert drawn.log_evidence == pytest.approx(np.log(2.5))
    dead, rows = resample(key, population.weighed(jnp.full(4, jnp.nan)), systematic, ALWAYS)
    assert rows.tolist() == [0, 1, 2, 3] and dead.log_evidence == -np.inf


def test_ancestors_are_counted_by_their_shares():
    assert num_ancestors(jnp.array([7, 7, 7, 7])) == 1.0
    assert num_ancestors(jnp.arange(8)) == 8.0
    assert num_ancestors(jnp.array([0, 0, 0, 1])) == pytest.approx(1.6)


def test_powers_keep_their_share():
    log_ratio = jnp.linspace(0.0, -40.0, 1000)
    for start in (0.0, 0.1):
        weight = np.exp(np.asarray((next_power(log_ratio, 0.7, start) - start) * log_ratio, np.float64))
        assert weight.sum() ** 2 / (weight**2).sum() == pytest.approx(700, rel=0.01)
    assert next_power(jnp.zeros(10), 0.7, jnp.float32(0.5)) == 1.0
    assert next_power(jnp.where(jnp.arange(10) < 8, 0.0, -jnp.inf), 0.7) == 1.0
    assert next_power(jnp.where(jnp.arange(10) < 6, 0.0, -jnp.inf), 0.7) < 1e-6
