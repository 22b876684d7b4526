"""Doors: one linear model, written in every way that filters read, has the Kalman filter's evidence; and the errors."""

import io
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import condition, mask, seed, substitute, trace
from scipy import stats

import scoreinfer as si
from filters.linear import AR1
from scoreinfer import _program
from scoreinfer.filters.base import AbstractFilter, Analysis, predict
from scoreinfer.markov import Sees
from scoreinfer.model.series import read_series
from scoreinfer.model.states import measured_times, read_space

BOOTSTRAP = si.filters.BootstrapFilter()
NUM, LENGTH = 20_000, 8
Y = AR1.simulate(3, LENGTH)[:, 0]
Y[4] = np.nan
TS = jnp.arange(LENGTH + 1.0)


def physics_path(y=None, ts=TS, present=True):
    x = numpyro.sample("x", si.PhysicsPath(lambda t0, t1, x: 0.9 * x, 0.6, ts, dist.Normal(0.0, 1.0)))
    with mask(mask=present):
        numpyro.sample("y", dist.Normal(x[1:], 0.8), obs=y)


def euler_maruyama(y=None):
    path = dist.EulerMaruyama(TS, lambda x, t: (-0.1 * x, 0.6), dist.Normal(jnp.zeros(1), 1.0).to_event(1))
    x = numpyro.sample("x", path)
    numpyro.sample("y", dist.Normal(x[1:, 0], 0.8).to_event(1), obs=y)


def inside_scan(y=None):
    def body(carry, y):
        x = numpyro.sample("x", dist.Normal(0.9 * carry, 0.6))
        numpyro.sample("y", dist.Normal(x, 0.8), obs=y)
        return x, x

    scan(body, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y, length=LENGTH)


def after_scan(y=None):
    def body(carry, _):
        x = numpyro.sample("x", dist.Normal(0.9 * carry, 0.6))
        return x, x

    _, x = scan(body, numpyro.sample("x0", dist.Normal(0.0, 1.0)), None, length=LENGTH)
    numpyro.sample("y", dist.Normal(x, 0.8).to_event(1), obs=y)


def counted_scan(y=None):
    """The carry counts the steps, and so is more than what is sampled."""

    def body(carry, y):
        before, count = carry
        x = numpyro.sample("x", dist.Normal(0.9 * before, jnp.where(count < 0, 9.0, 0.6)))
        numpyro.sample("y", dist.Normal(x, 0.8), obs=y)
        return (x, count + 1), None

    scan(body, (numpyro.sample("x0", dist.Normal(0.0, 1.0)), jnp.array(0)), y, length=LENGTH)


def unknown_slope(y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", si.PhysicsPath(lambda t0, t1, x: slope * x, 0.6, TS, dist.Normal(0.0, 1.0)))
    numpyro.sample("y", dist.Normal(x[1:], 0.8), obs=y)


def two_times(y=None):
    x = numpyro.sample("x", si.PhysicsPath(lambda t0, t1, x: 0.9 * x, 0.6, TS, dist.Normal(0.0, 1.0)))
    numpyro.sample("y", dist.Normal(x[1:] - x[:-1], 0.8), obs=y)


DOORS = [physics_path, euler_maruyama, inside_scan, after_scan, counted_scan, condition(unknown_slope, {"slope": 0.9})]


@pytest.mark.parametrize("model", DOORS, ids=[*(door.__name__ for door in DOORS[:-1]), "conditioned"])
def test_every_door_leads_to_the_same_model(model):
    run = si.filter(jax.random.key(0), model, "x", method=BOOTSTRAP, num_members=NUM, y=Y)
    means, _, log_evidence = AR1.kalman(Y[:, None])
    # 5 sd of the estimate: a relative variance of about 1.2 at each of 7 times, shared by the particles
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=5 * np.sqrt(7 * 1.2 / NUM))
    x = run.mean().reshape(len(run.ts), -1)[-LENGTH:, -1]
    assert np.abs(x - means[:, 0]).max() < 0.05
    observed, model_read = run.series.model.observed, run.series.model
    assert observed.kinds == (Sees.COMPONENT,) and observed.component == (model_read.dim - 1,)
    if model is counted_scan:
        assert model_read.log_transition is None and model_read.moments is None
        return
    x, new, t = jnp.array([0.3]), jnp.array([-0.4]), (jnp.array(1.0), jnp.array(2.0))
    log_f, moments = jax.jit(lambda x, new: (model_read.log_transition(*t, x, new), model_read.moments(*t, x)))(x, new)
    assert float(log_f) == pytest.approx(stats.norm.logpdf(-0.4, 0.27, 0.6), abs=1e-5)
    assert moments.mean.tolist() == pytest.approx([0.27])


def test_masks_and_nan_are_the_same_and_compile_once():
    given = Y.copy()
    given[4] = 1e6
    options = {"method": BOOTSTRAP, "num_members": 64}
    missing = si.filter(jax.random.key(0), physics_path, "x", **options, y=Y)
    before = _program._compiled._cache_size()
    other = np.where(np.arange(LENGTH) == 2, np.nan, Y)
    assert si.filter(jax.random.key(0), physics_path, "x", **options, y=other).log_evidence != missing.log_evidence
    assert _program._compiled._cache_size() == before
    masked = si.filter(jax.random.key(0), physics_path, "x", **options, y=given, present=~np.isnan(Y))
    assert masked.log_evidence == missing.log_evidence


def test_irregular_times_and_layouts_are_measured():
    """Observations at some times, in another order than time, of another component at each time."""
    ts = jnp.array([0.0, 0.5, 2.0, 2.25])
    spread = lambda t0, t1: jnp.sqrt(t1 - t0)  # noqa: E731

    def model(y=None):
        noise = spread(ts[:-1], ts[1:])[:, None]
        first = dist.Normal(jnp.zeros(3), 1.0).to_event(1)
        x = numpyro.sample("x", si.PhysicsPath(lambda t0, t1, x: x, noise, ts, first))
        numpyro.sample("y", dist.Normal(jnp.stack([x[3, 2], x[1, 0], x[3, 1]]), 0.5), obs=y)

    y = np.array([0.7, -0.2, 1.1])
    run = si.filter(jax.random.key(0), model, "x", method=BOOTSTRAP, num_members=NUM, y=y)
    assert run.series.model.observed.component == (0, 1, 2)
    expected = np.array([[np.nan] * 3, [-0.2, np.nan, np.nan], [np.nan] * 3, [np.nan, 1.1, 0.7]])
    np.testing.assert_allclose(run.series.y, expected, rtol=1e-6)
    variance = np.array([2.25 + 1, 1.5, 2.25 + 1]) + 0.25
    log_evidence = np.sum(-0.5 * y**2 / variance - 0.5 * np.log(2 * np.pi * variance))
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=0.06)


@pytest.mark.parametrize("inner", [physics_path, inside_scan])
def test_a_filter_inside_a_model_keeps_its_sites_to_itself(inner):
    """The outer model sees the evidence only, also for an unknown that the inner model takes as an argument."""

    def scaled(scale, y):
        inner(y * scale)

    def outer():
        scale = numpyro.sample("scale", dist.Uniform(0.9, 1.1))
        run = si.filter(jax.random.key(0), scaled, "x", scale, Y, method=BOOTSTRAP, num_members=64)
        numpyro.factor("evidence", run.log_evidence)

    played = trace(substitute(seed(outer, jax.random.key(1)), {"scale": jnp.array(1.0)})).get_trace()
    assert set(played) == {"scale", "evidence"}
    alone = si.filter(jax.random.key(0), inner, "x", Y, method=BOOTSTRAP, num_members=64).log_evidence
    assert float(played["evidence"]["fn"].log_factor) == pytest.approx(float(alone), rel=1e-5)


def test_extending_computes_nothing_again():
    options = {"method": BOOTSTRAP, "num_members": NUM}
    space, linear = AR1.space(), AR1.kalman(Y[:, None])
    half = si.filter(jax.random.key(0), space, **options, y=Y[:5, None])
    whole = si.extend(jax.random.key(1), half, y=Y[5:, None])
    np.testing.assert_array_equal(whole.analysis.x[:5], half.analysis.x)
    assert whole.ts.tolist() == list(range(1, LENGTH + 1))
    assert float(whole.log_evidence) == pytest.approx(linear[2], abs=0.12)
    half = si.filter(jax.random.key(0), physics_path, "x", **options, y=Y[:5], ts=TS[:6])
    whole = si.extend(jax.random.key(1), half, y=Y, ts=TS)
    np.testing.assert_array_equal(whole.analysis.x[:6], half.analysis.x)
    assert float(whole.log_evidence) == pytest.approx(linear[2], abs=0.12)
    with pytest.raises(ValueError, match="needs the 9 times of the run and further ones, got 9 times"):
        si.extend(jax.random.key(1), whole, y=Y, ts=TS)


# --- what is refused


def test_a_member_that_is_not_finite_is_replaced_and_counted():
    def transition(key, t0, t1, x):
        x = 0.9 * x + 0.6 * jax.random.normal(key, x.shape)
        return jnp.where(x > 1.2, jnp.nan, x)

    space = si.StateSpace(dist.Normal(jnp.zeros(1), 1.0).to_event(1), transition, AR1.space().observation)
    y = AR1.simulate(0, 6)
    for method in (si.filters.EnKF(), BOOTSTRAP):
        with pytest.warns(si.errors.DivergenceWarning, match=r"members were not finite.*`run.replaced`"):
            run = si.filter(jax.random.key(0), space, method=method, num_members=200, y=y)
        assert np.isfinite(run.analysis.x).all() and 0 < int(run.replaced.sum()) < 600
    lost = np.isneginf(np.asarray(run.forecast.log_weight)).sum(axis=1)
    assert (lost >= np.asarray(run.replaced)).all()
    broken = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: x * jnp.nan, lambda t, x: dist.Normal(x, 1.0))
    with pytest.raises(ValueError, match="No member is finite after the forecast to time 1"):
        si.filter(jax.random.key(0), broken, method=BOOTSTRAP, num_members=10, y=np.ones(2))


def filtered(model=None, *site, num_members=10, method=BOOTSTRAP, **data):
    return si.filter(jax.random.key(0), model or AR1.space(), *site, method=method, num_members=num_members, **data)


PAIR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
BOTH = si.StateSpace(PAIR, lambda t0, t1, x: x, lambda t, x: dist.Normal(x.sum(), 1.0))
WHOLE = si.StateSpace(PAIR, lambda t0, t1, x: x, lambda t, x: dist.Normal(x[0], jnp.exp(x[1])))
GROWS = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: x[None], lambda t, x: dist.Normal(x, 1.0))
COUNTS = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: x, lambda t, x: dist.Poisson(jnp.exp(x)))
ONES, COLUMN = np.ones(2), Y[:3, None]
LOCAL = si.filters.LETKF(taper=np.eye(2))
UNSUPPORTED = si.errors.UnsupportedModel


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: filtered(two_times, "x", y=Y), UNSUPPORTED, "depends on the states at two times, 0 and 1"),
        (lambda: filtered(unknown_slope, "x", y=Y), UNSUPPORTED, "'slope': is unknown besides the state"),
        (lambda: filtered(physics_path, "z", y=Y), UNSUPPORTED, "is no sample site of this model"),
        (lambda: filtered(physics_path, "x"), ValueError, "observes nothing: pass them as the model's arguments"),
        (lambda: filtered(physics_path, y=Y), TypeError, "Expected the name of the state's site"),
        (lambda: filtered(physics_path, "x", y=Y[:, None] * np.ones(3)), ValueError, r"must have shape \(8,\)"),
        (lambda: filtered(y=Y), ValueError, r"must have shape \(times, 1\)"),
        (lambda: filtered(y=COLUMN, ts=[1.0, 1.0, 2.0]), ValueError, "must increase, but number 0 is 1"),
        (lambda: filtered(y=COLUMN, ts=[-1.0, 1.0, 2.0]), ValueError, "must not come before the first state"),
        (lambda: filtered(y=COLUMN, ts=[1.0]), ValueError, "one time for each of the 3 observations"),
        (lambda: filtered(y=COLUMN, num_members=2), ValueError, "must be at least 3, got 2"),
        (lambda: filtered(WHOLE, y=ONES, method=si.filters.EnKF()), ValueError, "each see one number of the state"),
        (lambda: filtered(BOTH, y=ONES, method=LOCAL), ValueError, "whose place is known"),
        (lambda: filtered(GROWS, y=ONES), ValueError, "transition must return shape"),
        (lambda: filtered(COUNTS, y=-ONES), ValueError, "must lie in the support"),
    ],
)
def test_errors_say_what_came_and_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_check_says_what_can_be_filtered_and_what_is_seen():
    lines = lambda model: "\n".join(si.check(model, file=io.StringIO()).messages)  # noqa: E731
    assert "✓ `filter` 'x': 1 of 1 entries: one component of the state each" in lines(inside_scan)
    assert "! no `filter`: this model cannot be read: 'slope': is unknown besides the state" in lines(unknown_slope)
    assert "1 of 1 entries: a linear function of several components" in lines(BOTH)
    assert "1 of 1 entries: more than one number each, by particle methods only" in lines(WHOLE)
    assert not si.check(GROWS, file=io.StringIO())


def test_sums_and_scales_are_told_apart():
    seen = lambda space: filtered(space, y=np.ones(2)).series.model.observed.kinds  # noqa: E731
    assert seen(BOTH) == (Sees.LINEAR,) and seen(WHOLE) == (Sees.WHOLE,)
    product = si.StateSpace(BOTH.initial, BOTH.transition, lambda t, x: dist.Normal(x[0] * x[1], 1.0))
    rate = si.StateSpace(BOTH.initial, BOTH.transition, lambda t, x: dist.Poisson(jnp.exp(x.sum())))
    assert seen(product) == (Sees.NONLINEAR,) and seen(rate) == (Sees.LINEAR,)


def alternating_space():
    """A sensor of one component at even times and of the other at odd times: the same at the first, middle and last."""
    ts, y = jnp.arange(9.0), jnp.zeros(9)
    space = si.StateSpace(
        dist.Normal(jnp.zeros(2), 1.0).to_event(1),
        lambda t0, t1, x: dist.Normal(0.9 * x, 0.6).to_event(1),
        lambda t, x: dist.Normal(x[t.astype(int) % 2], 0.1),
    )
    return read_space(space, y, ts)


def alternating_scan():
    def model(y=None):
        def body(carry, k):
            x = numpyro.sample("x", dist.Normal(0.9 * carry, 0.6).to_event(1))
            numpyro.sample("y", dist.Normal(x[k % 2], 0.1))
            return x, None

        with condition(data={} if y is None else {"y": y}):
            scan(body, jnp.zeros(2), jnp.arange(9))

    return read_series(model, "x", (), {"y": jnp.zeros(9)})


@pytest.mark.parametrize("make", [alternating_space, alternating_scan])
def test_what_entries_see_is_measured_at_all_times(make):
    observed, x = make().model.observed, jnp.array([3.0, 5.0])
    assert observed.kinds == (Sees.LINEAR,)
    seen = jax.vmap(lambda t: observed.predict(t, x))(jnp.arange(9.0))
    np.testing.assert_allclose(seen[:, 0], np.where(np.arange(9) % 2, 5.0, 3.0))


def test_times_at_which_a_long_series_is_measured_lie_in_blocks_of_neighbours():
    chosen = np.asarray(measured_times(jnp.arange(1000.0)))
    assert chosen.size == 64 and chosen[0] == 0 and chosen[-1] == 999
    assert all({(chosen % period).tolist().count(k) > 0 for k in range(period)} == {True} for period in range(2, 9))
    assert np.sum(np.diff(chosen) == 1) == 56


class Breaking(AbstractFilter):
    """An analysis that returns NaN at time 3, in one member or as evidence."""

    log_evidence_kind: ClassVar = "approximate"
    in_evidence: bool = False

    def analyse(self, key, memory, t, members, observed, y):
        nan = jnp.where(t == 3, jnp.nan, 0.0)
        x = members.x if self.in_evidence else members.x.at[0].add(nan)
        log_evidence = nan - 1.0 if self.in_evidence else jnp.zeros(())
        return memory, Analysis(members._replace(x=x), log_evidence, predict(observed, t, members))


@pytest.mark.parametrize(("num", "in_evidence"), [(3, False), (4, True)])
def test_an_analysis_that_is_not_finite_is_named(num, in_evidence):
    with pytest.raises(ValueError, match="The analysis by `Breaking` at time 3 returns"):
        si.filter(jax.random.key(0), AR1.space(), method=Breaking(in_evidence), num_members=5, y=np.zeros((num, 1)))


def test_a_filter_without_an_evidence_passes_times_without_observations():
    y = np.array([[0.0], [np.nan], [0.0]])
    run = si.filter(jax.random.key(0), AR1.space(), method=si.filters.EnSF(), num_members=5, y=y)
    assert np.isnan(run.log_evidence) and np.isfinite(run.analysis.x).all()
