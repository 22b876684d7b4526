"""The score filter against Kalman, missing data and errors of the model; the scores that filters follow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import scoreinfer as si
from compilations import Compilations
from scoreinfer.filters.jumps import Jumps, white_noise
from scoreinfer.filters.sites import Prior
from scoreinfer.filters.taper import everywhere, grid
from scoreinfer.score import EnsembleScore, GaussianScore, PublishedScore, ShrunkenMixtureScore


def space(observe, dim=6):
    """A stable random walk on a ring, each component drawn to its neighbours."""
    return si.StateSpace(
        dist.Normal(jnp.zeros(dim), 1.0).to_event(1),
        lambda t0, t1, x: dist.Normal(0.6 * x + 0.3 * jnp.roll(x, 1), 0.3).to_event(1),
        observe,
    )


def normal(t, x):
    return dist.Normal(x, 0.5).to_event(1)


def test_missing_entries_recompile_nothing_and_are_not_read():
    y = np.asarray(jax.random.normal(jax.random.key(0), (6, 6)))
    method = si.filters.ScoreFilter(grid((6,), 1.0))

    def run(y):
        return si.filter(jax.random.key(1), space(normal), method=method, num_members=20, y=y)

    whole, gaps = run(y), y.copy()
    gaps[2, ::2], gaps[4] = np.nan, np.nan
    with Compilations() as compiled:
        part = run(gaps)
    assert compiled.count == 0
    np.testing.assert_array_equal(whole.analysis.x[:2], part.analysis.x[:2])
    np.testing.assert_array_equal(part.forecast.x[4], part.analysis.x[4])
    assert np.isfinite(part.analysis.x).all()


def test_weights_of_scales_find_the_error_and_stay_sparse_without_one():
    """Normal forecasts of variance 1/4, observed with noise 1/4; truths with and without noise of one climate's sd."""
    num, dim = 40, 60
    jumps, anomalies = Jumps(), white_noise(jax.random.key(0), num, jnp.full(dim, 0.25))
    prior = Prior(jnp.zeros(dim), anomalies, jnp.zeros(dim), grid((dim,), 8.0))
    for error in (0.0, 1.0):
        belief = jumps.init(jnp.stack([-jnp.ones(dim), jnp.ones(dim)]))
        scales, added = jumps.variances(belief.climate.sd), []
        for key in jax.random.split(jax.random.key(1), 12):
            truth = jnp.sqrt(0.25 + error) * jax.random.normal(key, (dim,))
            y = truth + 0.5 * jax.random.normal(jax.random.fold_in(key, 1), (dim,))
            belief, more = jumps.infer(belief, prior, scales, lambda u, y=y: -2.0 * (y - u) ** 2, jnp.ones(dim, bool))
            added.append(more)
        share = np.exp(belief.log_weight)
        assert share.sum() == pytest.approx(1.0, abs=1e-5)
        if error:
            assert np.argmax(share[1:]) == 4 and np.mean(added[4:]) == pytest.approx(error, rel=0.4)
        else:
            assert share[0] > 0.98 and np.mean(added[4:]) < 0.01


def test_white_noise_has_exact_moments():
    variance = jnp.array([0.0, 0.3, 2.0])
    noise = white_noise(jax.random.key(0), 7, variance)
    np.testing.assert_allclose(noise.mean(0), 0.0, atol=1e-6)
    np.testing.assert_allclose(noise.var(0, ddof=1), variance, rtol=1e-5)


def test_locality_of_another_state_is_refused():
    method = si.filters.ScoreFilter(grid((5,), 1.0))
    with pytest.raises(ValueError, match=r"must have 6 points.*got 5"):
        si.filter(jax.random.key(0), space(normal), method=method, num_members=20, y=np.zeros((2, 6)))


@pytest.mark.parametrize("noise", [0.003, 0.001])
def test_precise_observations_are_kalman_in_single_precision(noise):
    """A prior a thousand times wider than the noise; bounds are in posterior standard deviations."""
    y = np.array([0.7, -1.2, 0.4])
    precise = si.StateSpace(
        dist.Normal(jnp.zeros(3), 1.0).to_event(1),
        lambda t0, t1, x: dist.Normal(x, 0.1).to_event(1),
        lambda t, x: dist.Normal(x, noise).to_event(1),
    )
    method = si.filters.ScoreFilter(jumps=None, inflation=1.0)
    run = si.filter(jax.random.key(0), precise, method=method, num_members=200, y=y[None], ts=jnp.zeros(1))
    assert run.analysis.x.dtype == jnp.float32
    members = np.asarray(run.forecast.x[0], float)
    covariance = np.cov(members.T)
    gain = np.linalg.solve(covariance + noise**2 * np.eye(3), covariance).T
    mean, sd = members.mean(0) + gain @ (y - members.mean(0)), np.sqrt(np.diag(covariance - gain @ covariance))
    assert np.abs(run.mean()[0] - mean).max() < 0.02 * noise
    np.testing.assert_allclose(run.sd()[0], sd, rtol=0.01)


# --- scores


def test_a_local_score_of_whole_blocks_is_the_gaussian_score_and_the_mixture_lies_between():
    key = jax.random.key(0)
    members = jax.random.normal(key, (30, 4)) @ jax.random.normal(jax.random.fold_in(key, 1), (4, 4))
    mean, covariance = members.mean(0), jnp.cov(members.T)
    local = Prior(mean, members - mean, jnp.zeros(4), everywhere(4)).score()
    level, x, equal = jnp.array(0.7), jnp.arange(4.0), jnp.zeros(30)
    gaussian = GaussianScore(mean, covariance)(level, x)
    np.testing.assert_allclose(local(level, x), gaussian, rtol=1e-4)
    wide = ShrunkenMixtureScore(members, equal, covariance, 1.0)(level, x)
    np.testing.assert_allclose(wide, gaussian, rtol=1e-3, atol=1e-4)
    narrow = ShrunkenMixtureScore(members, equal, covariance, 0.0)(level, x)
    np.testing.assert_allclose(narrow, EnsembleScore(members, equal)(level, x), rtol=1e-4)


def test_the_published_score_is_its_own_formula_at_every_level():
    score = PublishedScore(jnp.array([0.3, -1.0]), lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), 0.4, 0.05)
    for t in (0.0, 0.3, 0.99):
        alpha, square = 1.0 - 0.6 * t, 0.05 + 0.95 * t
        level, z = jnp.sqrt(square) / alpha, jnp.array([0.2, 0.5])
        assert float(score.time(level)) == pytest.approx(t, abs=1e-5)
        expected = -(z - alpha * score.point) / square + (1.0 - t) * (1.0 - z)
        np.testing.assert_allclose(score(level, z / alpha), alpha * expected, rtol=1e-4)


def test_more_steps_lead_the_published_filter_back_to_the_forecast():
    """Prior N(0, 1), y = 2 with noise 1: the posterior mean is 1. A heuristic: it is 0 in the limit."""
    single = si.StateSpace(
        dist.Normal(0.0, 1.0), lambda t0, t1, x: dist.Normal(x, 1e-3), lambda t, x: dist.Normal(x, 1.0)
    )
    found = []
    for steps, eps in ((20, 0.05), (2000, 1e-4)):
        method = si.filters.EnSF(eps, eps, steps)
        run = si.filter(jax.random.key(0), single, method=method, num_members=400, y=jnp.array([2.0]))
        found.append(float(run.mean()[0] - run.forecast.x.mean()))
    assert abs(found[1]) < 0.15 < found[0]


# --- the mixture


def test_a_narrow_mixture_finds_two_modes_that_one_gaussian_cannot():
    """Members from two lobes, y = x^2 / 4 with noise: each lobe keeps its share, and the evidence is the exact one."""
    lobes = si.StateSpace(
        dist.Normal(0.0, 1.0),
        lambda t0, t1, x: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-2.0, 2.0]), 0.5)
        ),
        lambda t, x: dist.Normal(0.25 * x**2, 0.3),
    )
    x = np.linspace(-6.0, 6.0, 4001)
    prior = 0.3 * stats.norm.pdf(x, -2, 0.5) + 0.7 * stats.norm.pdf(x, 2, 0.5)
    weight, num = prior * stats.norm.pdf(1.4, 0.25 * x**2, 0.3), 600
    exact, log_evidence = np.average(np.abs(x), weights=weight), np.log(weight.sum() * (x[1] - x[0]))
    found = {}
    for bandwidth in (1.0, 0.1):
        method = si.filters.ScoreFilter(inflation=1.0, jumps=None, bandwidth=bandwidth)
        run = si.filter(jax.random.key(0), lobes, method=method, num_members=num, y=jnp.array([1.4]))
        found[bandwidth] = np.asarray(run.analysis.x[0]), float(run.log_evidence)
    members, evidence = found[0.1]
    assert abs((members > 0).mean() - 0.7) < 5 * np.sqrt(0.7 * 0.3 / num) + 0.02
    assert abs(np.abs(members).mean() - exact) < 5 * np.abs(members).std() / np.sqrt(num)
    assert evidence == pytest.approx(log_evidence, abs=0.1)
    gaussian = np.abs(found[1.0][0])
    assert abs(gaussian.mean() - exact) > 5 * gaussian.std() / np.sqrt(num), (gaussian.mean(), exact)


@pytest.mark.parametrize("bandwidth", [0.0, 1.2])
def test_bandwidths_out_of_range_are_refused(bandwidth):
    for method in (
        si.filters.ScoreFilter(bandwidth=bandwidth),
        si.filters.ScoreFilter(grid((6,), 1.0), bandwidth=0.5),
    ):
        with pytest.raises(ValueError, match="`bandwidth` must be in"):
            si.filter(jax.random.key(0), space(normal), method=method, num_members=20, y=np.zeros((2, 6)))
