"""The certificate of filters: e-values, alarms at their rate, twins that tell filters apart, skill, and words."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import scoreinfer as si
from filters.linear import TURN
from scoreinfer.filters.base import AbstractFilter, Analysis, Predictive, predict
from scoreinfer.filters.monitoring import ALARM, TOLERATED_MEAN, TOLERATED_SD, log_e_values, monitor, probits
from scoreinfer.filters.skill import crps
from scoreinfer.filters.twins import Twins
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
