"""SDA and its finishes against the exact smoother of a linear Gaussian path, and against lobes that nobody crosses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from scoreinfer.errors import UnreadableFile, UnsupportedModel
from scoreinfer.files import read_record, write_record
from scoreinfer.samplers import HMC, LocalPrior, ParticleGibbs
from scoreinfer.samplers.local_prior import Context
from scoreinfer.score import GaussianScore

KEEP, TIMES, EVERY, NOISE, NUM = 0.9, 7, 3, 0.3, 256
TS = jnp.arange(float(TIMES))
Y = jnp.array([1.5, -0.5, 1.0])
QUICK, SWEEPS = HMC(30, 5), ParticleGibbs(10, 32)


def path(step=lambda s, t, x: KEEP * x):
    return si.PhysicsPath(step, (1 - KEEP**2) ** 0.5, TS, dist.Normal(0.0, 1.0))


def linear(y=None):
    x = numpyro.sample("x", path())
    numpyro.sample("y", dist.Normal(x[::EVERY], NOISE), obs=y)


def squared(y=None):
    """See the square of one state: the path may be its own negative."""
    x = numpyro.sample("x", path())
    numpyro.sample("y", dist.Normal(x[3] ** 2, 0.3), obs=y)


def covariance(num):
    return KEEP ** np.abs(np.subtract.outer(np.arange(num), np.arange(num)))


def local(k, mean=0.0):
    window = GaussianScore(jnp.full(2 * k + 1, mean, jnp.float32), jnp.asarray(covariance(2 * k + 1), jnp.float32))
    return LocalPrior(window, k, jnp.zeros(1), jnp.ones(1), ())


def exact():
    """Compute the smoother's mean and covariance, as the Gaussian of the whole path given the data."""
    prior, rows = covariance(TIMES), np.eye(TIMES)[::EVERY]
    gain = prior @ rows.T @ np.linalg.inv(rows @ prior @ rows.T + NOISE**2 * np.eye(len(Y)))
    return gain @ np.asarray(Y), prior - gain @ rows @ prior


def errors(x, num):
    """Compute the largest errors of means and covariances, in their standard errors."""
    mean, spread = exact()
    x = np.asarray(x, np.float64)
    sd = np.sqrt(np.diag(spread))
    of_mean = np.abs(x.mean(0) - mean) / (sd / num**0.5)
    of_spread = np.abs(np.cov(x.T) - spread) / np.sqrt((np.outer(sd, sd) ** 2 + spread**2) / num)
    return of_mean.max(), of_spread.max()


@functools.cache
def drawn(finish):
    given = si.SDA(linear, "x", local(1), finish=finish, num_steps=16).condition(y=Y)
    return given.sample(jax.random.key(0), NUM)


@pytest.mark.always
@pytest.mark.parametrize("finish", [QUICK, SWEEPS], ids=["hmc", "gibbs"])
def test_finished_draws_are_those_of_the_smoother(finish):
    draws = drawn(finish)
    found = draws.certificate
    assert found.certified, str(found)
    assert found.num == NUM and found.shares == (1.0,) and 0.5 < found.accept_prob <= 1.0
    assert max(errors(draws.sites["x"], NUM)) < 5.0
    assert np.array_equal(draws.get_samples()["x"], draws.sites["x"])
    problem = draws.problem
    again = jax.vmap(problem.log_prior)(draws.unconstrained) + jax.vmap(lambda z: problem.log_likelihood(z, {}))(
        draws.unconstrained
    )
    np.testing.assert_allclose(draws.log_joint, again, rtol=1e-4)


def test_unfinished_draws_are_biased_and_say_so():
    draws = drawn(None)
    assert not draws.certificate.certified and "unfinished" in draws.certificate.reason and draws.log_weight is None
    assert max(errors(draws.sites["x"], NUM)) > 6.0, errors(draws.sites["x"], NUM)


def test_no_score_is_needed_for_a_small_state():
    given = si.SDA(linear, "x", finish=SWEEPS).condition(y=Y)
    draws = given.sample(jax.random.key(1), NUM)
    assert draws.certificate.certified and max(errors(draws.sites["x"], NUM)) < 5.0


def test_missing_data_are_left_out():
    def masked(y=None):
        x = numpyro.sample("x", path())
        with numpyro.handlers.mask(mask=np.arange(TIMES) % EVERY == 0):
            numpyro.sample("y", dist.Normal(x, NOISE), obs=y)

    given = si.SDA(masked, "x", local(1), finish=QUICK, num_steps=16)
    y = jnp.full(TIMES, 7.0).at[::EVERY].set(Y)
    draws = given.condition(y=y).sample(jax.random.key(2), NUM)
    assert max(errors(draws.sites["x"], NUM)) < 5.0


def test_lobes_have_their_shares_or_are_refused():
    """By symmetry each sign of the path has half of the posterior; no chain crosses."""
    y = 4.0
    both = si.SDA(squared, "x", local(1), finish=QUICK, num_steps=16).condition(y=y)
    draws = both.sample(jax.random.key(0), 128, num_explorers=128)
    share = float((draws.sites["x"].mean(1) > 0).mean())
    assert sorted(draws.certificate.shares) == pytest.approx(sorted([share, 1 - share]))
    assert abs(share - 0.5) < 0.1 or not draws.certificate.certified
    one = si.SDA(squared, "x", local(1, mean=4.0), finish=QUICK, num_steps=16).condition(y=y)
    refused = one.sample(jax.random.key(0), 128, num_explorers=128).certificate
    assert not refused.certified and "2 lobes" in refused.reason and max(refused.shares) > 0.9


def test_bad_input_is_told():
    model = functools.partial(si.SDA, linear, "x")
    with pytest.raises(ValueError, match="got neither"):
        model(finish=None)
    with pytest.raises(ValueError, match="windows of 9 times, and the path has only 7"):
        model(local(4)).condition(y=Y)
    with pytest.raises(ValueError, match=r"states of shape \(2,\)"):
        model(LocalPrior(local(1).window, 1, jnp.zeros(2), jnp.ones(2), (2,))).condition(y=Y)
    with pytest.raises(ValueError, match="made for another shape"):
        model(GaussianScore(jnp.zeros(3), jnp.eye(3))).condition(y=Y)
    with pytest.raises(ValueError, match="Expected data"):
        model(local(1)).condition()
    with pytest.raises(ValueError, match="see nothing"):
        si.SDA(lambda y=None: (numpyro.sample("x", path()), numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)), "x",
               local(1)).condition(y=0.0)  # fmt: skip
    given = model(finish=ParticleGibbs(2, 8)).condition(y=Y)
    with pytest.raises(ValueError, match="at least 4 explorers"):
        given.sample(jax.random.key(0), 8, num_explorers=2)
    with pytest.raises(ValueError, match=r"paths of shape \(7,\)"):
        given.sample(jax.random.key(0), 8, explorers=jnp.zeros((3, 4)))


# --- learning a local score


def test_learned_windows_are_nearly_those_of_the_process():
    prior = si.fit_local(jax.random.key(0), linear, "x", k=1, num_steps=500, width=16, depth=1, progress_bar=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=TIMES), jnp.float32)
    level = jnp.float32(0.5)
    found = prior.over((TIMES,)).score.denoise(level, x)
    expected = local(1).over((TIMES,)).score.denoise(level, x)
    assert float(jnp.abs(found - expected).max()) < 0.08
    assert abs(float(prior.mean[0])) < 0.1 and abs(float(prior.scale[0]) - 1) < 0.05


SHORT = 5


def forced(forcing=None, y=None):
    """Push every state by a forcing, which the score may be told."""
    if forcing is None:
        forcing = numpyro.sample("forcing", dist.Normal(0.0, 1.0).expand([SHORT]).to_event(1))
    numpyro.deterministic("told", forcing)
    step, first = (lambda s, t, x: KEEP * x + jnp.interp(s, TS[:SHORT], forcing)), dist.Normal(0.0, 1.0)
    x = numpyro.sample("x", si.PhysicsPath(step, (1 - KEEP**2) ** 0.5, TS[:SHORT], first))
    numpyro.sample("y", dist.Normal(x[::2], NOISE), obs=y)


@functools.cache
def learned_forced(context):
    return si.fit_local(
        jax.random.key(3), forced, "x", k=2, context=context, num_steps=1000, width=24, depth=1, progress_bar=False
    )


@pytest.mark.slow
def test_scores_that_are_told_the_forcing_are_those_of_the_forced_process():
    """Given the forcing the path is Gaussian: its mean follows the forcing, its covariance does not see it."""
    rng = np.random.default_rng(1)
    forcing, cov = rng.normal(size=SHORT), covariance(SHORT)
    mean = np.zeros(SHORT)
    for t in range(SHORT - 1):
        mean[t + 1] = KEEP * mean[t] + forcing[t]
    level, num = 0.7, 64
    noisy = cov + level**2 * np.eye(SHORT)
    x = mean + rng.normal(size=(num, SHORT)) @ np.linalg.cholesky(noisy).T
    exact = mean + (x - mean) @ np.linalg.solve(noisy, cov)

    def error(context):
        """Compute the root mean squared error of the prior that the data are conditioned on."""
        local = learned_forced(context)
        prior = si.SDA(forced, "x", local).condition(jnp.asarray(forcing, jnp.float32), y=jnp.zeros(3)).prior
        scale = local.scale[0]  # of the score's units, for its level too
        denoise = jax.vmap(lambda row: prior.score.denoise(level / scale, prior.change.inverse(row)))
        found = prior.change.forward(denoise(jnp.asarray(x, jnp.float32)))
        return float(np.sqrt(((np.asarray(found) - exact) ** 2).mean()))

    told, untold = error("told"), error(None)
    assert told < 0.1 and untold > 3 * told, (told, untold)


@pytest.mark.slow
def test_saved_local_priors_are_loaded(tmp_path):
    local, noise, context = learned_forced("told"), jnp.linspace(-1.0, 1.0, SHORT), jnp.arange(float(SHORT))
    si.save_score(local, tmp_path)
    loaded = si.load_score(tmp_path)
    found, expected = (prior.over((SHORT,), context) for prior in (loaded, local))
    np.testing.assert_array_equal(found.score.denoise(jnp.array(0.5), noise), expected.score.denoise(0.5, noise))
    assert jax.tree.structure(loaded) == jax.tree.structure(local) and loaded.training == local.training
    config = tmp_path / "config.json"
    kept = read_record(config)
    for change, words in [
        ({"k": 1}, "arrays do not fit"), ({"k": "two"}, "does not describe"),
        ({"format": "another program's"}, "expected the format 'scoreinfer learned prior' or"),
    ]:  # fmt: skip
        write_record(config, kept | change)
        with pytest.raises(UnreadableFile, match=words):
            si.load_score(tmp_path)
    with pytest.raises(ValueError, match="Only scores learned by `fit_score` or `fit_local`"):
        si.save_score(LocalPrior(GaussianScore(jnp.zeros(3), jnp.eye(3)), 1, jnp.zeros(1), jnp.ones(1), ()), tmp_path)


def test_contexts_that_do_not_fit_are_refused():
    plain = local(2)
    told = dataclasses.replace(plain, context=Context("told", jnp.zeros(1), jnp.ones(1)))
    with pytest.raises(ValueError, match="learned with values of the context 'told'; got none"):
        told.over((SHORT,))
    with pytest.raises(ValueError, match="learned with no context; got some"):
        plain.over((SHORT,), jnp.zeros(SHORT))
    with pytest.raises(ValueError, match="1 numbers for each time when the score was learned, and has 2 now"):
        told.over((SHORT,), jnp.zeros((SHORT, 2)))
    with pytest.raises(ValueError, match="a row for each of the 6 times, got 5 rows"):
        told.over((SHORT + 1,), jnp.zeros(SHORT))
    with pytest.raises(ValueError, match=r"a row for each of the 7 times, got shape \(3,\)"):
        si.fit_local(jax.random.key(0), linear, "x", context="y", k=1)


def test_paths_that_cannot_be_learned_are_refused():
    fit = functools.partial(si.fit_local, jax.random.key(0))
    with pytest.raises(ValueError, match="at least 2 k \\+ 1 = 21 times"):
        fit(linear, "x", k=10)
    with pytest.raises(UnsupportedModel, match="is no site"):
        fit(linear, "path")
    with pytest.raises(ValueError, match="not all finite"):
        fit(lambda: numpyro.sample("x", path(lambda s, t, x: jnp.inf * x)), "x")
