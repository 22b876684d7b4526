"""The certificate of filters: e-values, alarms at their rate, twins that tell filters apart, skill, and words."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import scoreinfer as si
from compilations import Compilations
from filters.linear import AR1, TURN
from scoreinfer.filters.base import AbstractFilter, Analysis, Predictive, predict
from scoreinfer.filters.monitoring import ALARM, TOLERATED_MEAN, TOLERATED_SD, log_e_values, monitor, probits
from scoreinfer.filters.skill import crps
from scoreinfer.filters.twins import Twins, simulate
from scoreinfer.model.states import read_space

LETKF = si.filters.LETKF()


def expected(mean, sd):
    """Expected e-values under a normal law, by quadrature."""
    z = np.linspace(-14.0, 14.0, 20_001)
    value = np.exp(np.asarray(log_e_values(jnp.asarray(z)), float)) * stats.norm.pdf(z, mean, sd)
    return value.sum(1) * (z[1] - z[0])


def test_e_values_have_expectation_one_at_most_within_the_tolerances_and_more_beyond():
    for mean in (-TOLERATED_MEAN, 0.0, TOLERATED_MEAN):
        for sd in (*TOLERATED_SD, 1.0):
            assert expected(mean, sd).max() < 1.0 + 1e-4
    narrow, wide, low, high = (
        expected(0.0, 1.4)[0],
        expected(0.0, 0.7)[1],
        expected(0.5, 1.0)[2],
        expected(-0.5, 1.0)[3],
    )
    assert min(narrow, wide, low, high) > 1.02


def test_alarms_come_at_their_rate_at_most_and_soon_where_forecasts_are_wrong():
    rng, runs = np.random.default_rng(0), 150
    at_bound = rng.normal(TOLERATED_MEAN, TOLERATED_SD[1], (runs, 100, 3))
    rate = np.mean([monitor(z).alarm is not None for z in at_bound])
    assert rate <= 1 / ALARM + 5 * np.sqrt(0.05 * 0.95 / runs)
    for law, kind in (((0, 1.8), "too narrowly"), ((0, 0.5), "too widely"), ((1.0, 1.0), "too low")):
        found = monitor(rng.normal(*law, (100, 20)), start=5)
        assert found.kind == kind and 5 <= found.alarm < 60
    assert monitor(np.full((4, 3), np.nan)).alarm is None


def test_missing_entries_do_not_count():
    z = np.random.default_rng(1).normal(size=(20, 4))
    gaps = z.copy()
    gaps[:, 2:] = np.nan
    np.testing.assert_allclose(monitor(gaps).log_evidence, monitor(z[:, :2]).log_evidence, atol=1e-5)


@pytest.mark.parametrize("law", [lambda t, x: dist.Normal(x, 0.5), lambda t, x: dist.Poisson(jnp.exp(x))])
def test_probits_of_a_right_forecast_are_standard_normal(law):
    """Forecasts are members with a scale that adds nothing and one that adds a known variance."""
    space = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: dist.Normal(x, 1.0), law)
    times, num = 300, 100
    observed = read_space(space, jnp.ones(times), None).model.observed
    keys = jax.random.split(jax.random.key(0), 3)
    jump = jax.random.bernoulli(keys[0], 0.3, (times,))
    truth = jnp.sqrt(0.5 + jump) * jax.random.normal(keys[1], (times,))
    y = jax.vmap(lambda key, u: observed.sample(key, jnp.ones(()), u))(jax.random.split(keys[2], times), truth[:, None])
    u = jnp.sqrt(0.5) * jax.random.normal(jax.random.key(3), (times, num, 1))
    forecast = Predictive(
        u, jnp.zeros((times, num)), jnp.tile(jnp.array([[0.0], [1.0]]), (times, 1, 1)),
        jnp.tile(jnp.log(jnp.array([0.7, 0.3])), (times, 1)),
    )  # fmt: skip
    z = np.asarray(probits(jax.random.key(4), observed, jnp.ones(times), forecast, y))[:, 0]
    assert abs(z.mean()) < 5 / np.sqrt(times) and abs(z.std() - 1) < 5 / np.sqrt(2 * times)
    assert stats.kstest(z, "norm").pvalue > 1e-4


def test_a_lost_filter_alarms():
    """Members that are NaN forecast nothing: that is no missing observation."""
    law = lambda t, x: dist.Normal(x, 0.5)  # noqa: E731
    space, times = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: dist.Normal(x, 1.0), law), 20
    observed, ones = read_space(space, jnp.ones(times), None).model.observed, jnp.ones((times, 1, 1))
    forecast = Predictive(jnp.full((times, 5, 1), jnp.nan), jnp.zeros((times, 5)), 0.0 * ones, 0.0 * ones[..., 0])
    y = jnp.zeros((times, 1)).at[0].set(jnp.nan)
    z = probits(jax.random.key(0), observed, jnp.ones(times), forecast, y)
    assert np.isnan(z[0]).all() and (z[1:] < -5).all()
    assert monitor(z).alarm == 2


def test_the_score_of_an_ensemble_is_fair():
    """The mean over ensembles is the score of their law, here of N(0, 1): Gneiting and Raftery 2007, equation 21."""
    draws, y = np.random.default_rng(0).normal(size=(5, 40_000)), 0.7
    found = np.asarray(crps(jnp.asarray(draws), jnp.full(40_000, y)))
    exact = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / np.sqrt(np.pi)
    assert abs(found.mean() - exact) < 5 * found.std() / np.sqrt(found.size)


class Frozen(AbstractFilter):
    """Forecasts that never change: the climate of `TURN`."""

    log_evidence_kind: ClassVar = "approximate"

    def forecast(self, key, memory, model, t0, t1, members, y):
        sd = TURN.noise / np.sqrt(1 - 0.95**2)
        return members._replace(x=sd * jax.random.normal(key, members.x.shape))

    def analyse(self, key, memory, t, members, observed, y):
        return memory, Analysis(members, jnp.zeros(()), predict(observed, t, members))


@pytest.fixture(scope="module")
def twins():
    """Twins of three filters on the linear model."""
    y = np.zeros((40, 2))
    methods = {"letkf": LETKF, "ensf": si.filters.EnSF(0.5, 0.025, 20)}
    return {
        name: si.twin(
            jax.random.key(0), TURN.space(), method=method, num_members=100, y=y, num_experiments=30, spin_up=5
        )
        for name, method in methods.items()
    }


@pytest.mark.always
def test_twins_accept_a_calibrated_filter_and_flag_the_published_one(twins):
    assert twins["letkf"].certified, twins["letkf"].reason
    assert not twins["ensf"].certified and "outside" in twins["ensf"].reason


def filtered(y, method=LETKF, error=TURN.error):
    space = TURN._replace(error=error).space()
    return si.filter(jax.random.key(1), space, method=method, num_members=100, y=y)


def test_verdicts_tell_the_filter_from_the_model(twins):
    y = TURN.simulate(3, 150)
    good = si.filters.certify(
        jax.random.key(2), filtered(y), twins=twins["letkf"], rivals={"frozen": filtered(y, Frozen())}
    )
    assert good.certified and str(good).startswith("certified on twins and on these data up to t=150"), str(good)
    assert good.skill["LETKF"] < good.skill["frozen"] and "100 members" not in good.limits
    exact = TURN.kalman(y)[2] / y.size  # the last forecasts are all but the Kalman filter's
    assert good.log_score["LETKF"] == pytest.approx(exact, abs=0.1)
    assert good.log_score["LETKF"] > max(good.log_score[name] for name in ("frozen", "climatology", "persistence"))
    halved = filtered(y, error=0.5 * TURN.error)
    bad = si.filters.certify(jax.random.key(2), halved, twins=twins["letkf"])
    assert (
        not bad.certified and "times as widely as forecast" in bad.reason and "the model, not the filter" in bad.reason
    )
    assert "nothing is said of the model" in si.filters.certify(jax.random.key(2), halved, twins=twins["ensf"]).reason
    assert "twins were not run" in si.filters.certify(jax.random.key(2), halved).reason


def test_a_frozen_climate_is_refused_for_lack_of_skill():
    found = si.filters.certify(jax.random.key(2), filtered(TURN.simulate(4, 150), Frozen()))
    assert found.data.alarm is None and not found.certified and "climatology" in found.reason


def test_bad_requests_are_refused():
    run = filtered(TURN.simulate(0, 5))
    with pytest.raises(ValueError, match="other observations"):
        si.filters.certify(jax.random.key(0), run, rivals={"other": filtered(TURN.simulate(1, 5))})
    with pytest.raises(ValueError, match="`spin_up` must be below"):
        si.filters.certify(jax.random.key(0), run, spin_up=5)
    with pytest.raises(ValueError, match="at least 2"):
        si.twin(jax.random.key(0), TURN.space(), method=LETKF, num_members=9, y=np.zeros((4, 2)), num_experiments=1)
    lost = Twins(np.array([0.9, np.nan]), np.array([1.0, np.nan]), np.array([1.0, np.nan]), 2, 9)
    assert not lost.certified and "lost in 1 of 2 worlds" in lost.reason


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2)])
def test_probits_without_a_distribution_function_are_standard_normal_for_few_members(shares):
    """48 draws stand for the forecast: an observation beyond all of them comes once in 25 times."""
    space = si.StateSpace(
        dist.Normal(0.0, 1.0), lambda t0, t1, x: dist.Normal(x, 1.0), lambda t, x: dist.Kumaraswamy(jnp.exp(x), 2.0)
    )
    times, keys = 1000, jax.random.split(jax.random.key(0), 3)
    observed = read_space(space, jnp.full(times, 0.5), None).model.observed
    with pytest.raises(NotImplementedError):
        observed.cdf(jnp.ones(()), jnp.zeros(1), jnp.full(1, 0.5))
    u, log_weight = jax.random.normal(keys[0], (times, 3, 1)), jnp.log(jnp.asarray(shares))
    row = jax.random.categorical(keys[1], log_weight, shape=(times,))
    truth = jnp.take_along_axis(u, row[:, None, None], 1)[:, 0]
    y = jax.vmap(lambda key, u: observed.sample(key, jnp.ones(()), u))(jax.random.split(keys[2], times), truth)
    forecast = Predictive(u, jnp.tile(log_weight, (times, 1)), jnp.zeros((times, 1, 1)), jnp.zeros((times, 1)))
    z = np.asarray(probits(jax.random.key(4), observed, jnp.ones(times), forecast, y))[:, 0]
    assert abs(z.mean()) < 5 / np.sqrt(times) and abs(z.std() - 1) < 5 / np.sqrt(2 * times)
    assert stats.kstest(z, "norm").pvalue > 1e-4 and abs(z).max() < 4.5


class Exact(AbstractFilter):
    """Draws from the Kalman filter's posterior of `AR1`, with its spread times a factor."""

    log_evidence_kind: ClassVar = "approximate"
    factor: float = 1.0

    def init(self, key, members):
        return jnp.zeros(()), jnp.ones(())

    def forecast(self, key, memory, model, t0, t1, members, y):
        return members

    def analyse(self, key, memory, t, members, observed, y):
        move, noise, error = AR1.move[0, 0], AR1.noise, AR1.error
        mean, variance = move * memory[0], move**2 * memory[1] + noise**2
        gain = variance / (variance + error**2)
        mean, variance = mean + gain * (y[0] - mean), (1 - gain) * variance
        x = mean + self.factor * jnp.sqrt(variance) * jax.random.normal(key, members.x.shape)
        analysis = Analysis(members._replace(x=x), jnp.zeros(()), predict(observed, t, members))
        return (mean, variance), analysis


def verdicts(factor, worlds, groups=50):
    """Verdicts of independent twins, whose worlds are simulated together."""
    found = si.twin(
        jax.random.key(1), AR1.space(), method=Exact(factor), num_members=50, y=np.zeros((40, 1)),
        num_experiments=50 * 40,
    )  # fmt: skip
    parts = [np.asarray(part).reshape(groups, -1)[:, :worlds] for part in found[:3]]
    return [Twins(*rows, 1, 50).verdict for rows in zip(*parts, strict=True)]


def test_twins_refuse_an_exact_filter_at_their_rate_at_most_and_say_if_worlds_are_too_few():
    few, many = verdicts(1.0, 5), verdicts(1.0, 40)
    for found in (few, many):
        assert found.count("not certified") / 50 < 0.05 + 5 * np.sqrt(0.05 * 0.95 / 50)
    assert few.count("not decided") > 25 and many.count("certified") > 45
    assert set(verdicts(0.7, 40)) == {"not certified"}


def test_certificates_say_that_worlds_are_too_few():
    run = filtered(TURN.simulate(3, 150))
    few = Twins(np.array([0.8, 0.95, 0.9]), np.array([0.9, 1.0, 1.2]), np.ones(3), 2, 100)
    found = si.filters.certify(jax.random.key(2), run, twins=few)
    assert found.verdict == "not decided" and str(found).startswith("not decided: ") and "too few worlds" in str(found)
    halved = si.filters.certify(jax.random.key(2), filtered(TURN.simulate(3, 150), error=0.5 * TURN.error), twins=few)
    assert halved.verdict == "not certified" and "twins are too few" in halved.reason


def test_worlds_of_entries_that_see_more_than_one_number_follow_the_model_and_certificates_refuse_them():
    space = si.StateSpace(
        dist.Normal(jnp.zeros(2), 1.0).to_event(1),
        lambda t0, t1, x: dist.Normal(0.9 * x, 0.5).to_event(1),
        lambda t, x: dist.Normal(x[0], jnp.exp(x[1])),
    )
    series = read_space(space, jnp.zeros(2000), None)
    x, y = jax.tree.map(np.asarray, simulate(jax.random.key(0), series))
    z = (y[:, 0] - x[:, 0]) / np.exp(x[:, 1])
    assert stats.kstest(z, "norm").pvalue > 1e-4
    run = si.filter(jax.random.key(1), space, method=si.filters.BootstrapFilter(), num_members=10, y=jnp.zeros(3))
    with pytest.raises(ValueError, match="`certify` needs observations whose entries each see one number"):
        si.filters.certify(jax.random.key(2), run)


def test_twins_and_certificates_are_compiled_once():
    def judge(seed):
        space, y = TURN.space(), TURN.simulate(seed, 12)
        twins = si.twin(jax.random.key(seed), space, method=LETKF, num_members=10, y=y, num_experiments=3)
        run = si.filter(jax.random.key(seed), space, method=LETKF, num_members=10, y=y)
        return si.filters.certify(jax.random.key(seed), run, twins=twins).certified

    judge(0)
    with Compilations() as again:
        judge(1)
    assert again.count == 0
