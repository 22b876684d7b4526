"""Particle filters: the Kalman filter's moments, unbiased evidence, missing entries."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import scoreinfer as si
from filters.linear import AR1, PARTLY, TURN
from scoreinfer.montecarlo.resampling import multinomial

BOOTSTRAP = si.filters.BootstrapFilter()


def moments_off(run, means, covs):
    """Compare all filtered means and variances with the truth, in standard errors by the ESS of each time."""
    weight = np.asarray(jax.nn.softmax(run.analysis.log_weight, axis=1), np.float64)
    x = np.asarray(run.analysis.x, np.float64)
    sd = np.sqrt(np.diagonal(covs, axis1=1, axis2=2))
    ess = 1.0 / (weight**2).sum(axis=1)
    # Particles share ancestors: what is resampled adds its own variance, a factor that mixing bounds.
    error = np.sqrt(3.0 / ess)[:, None]
    mean = np.einsum("tn,tnd->td", weight, x)
    variance = np.einsum("tn,tnd->td", weight, (x - means[:, None]) ** 2)
    return max(np.abs((mean - means) / sd / error).max(), np.abs((variance / sd**2 - 1) / np.sqrt(2) / error).max())


@pytest.mark.parametrize("method", [BOOTSTRAP, si.filters.BootstrapFilter(scheme=multinomial)])
@pytest.mark.parametrize("linear", [AR1, PARTLY])
def test_moments_are_those_of_the_kalman_filter(linear, method):
    y = linear.simulate(0, 12)
    y[3:5] = np.nan
    means, covs, log_evidence = linear.kalman(y)
    run = si.filter(jax.random.key(0), linear.space(), method=method, num_members=20_000, y=y)
    assert moments_off(run, means, covs) < 5
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=0.1)


@pytest.mark.parametrize("method", [BOOTSTRAP])
def test_evidence_is_unbiased(method):
    """The mean of exp(log evidence) over many runs of few particles, against its own standard error."""
    y = AR1.simulate(1, 6)
    y[2] = np.nan
    truth = AR1.kalman(y)[2]
    space = AR1.space()

    @jax.jit
    def evidences(keys):
        run = lambda key: si.filter(key, space, method=method, num_members=16, y=y).log_evidence  # noqa: E731
        return jax.lax.map(run, keys, batch_size=1000)

    ratio = np.exp(np.asarray(evidences(jax.random.split(jax.random.key(2), 10_000)), np.float64) - truth)
    assert abs(ratio.mean() - 1.0) < 5 * ratio.std() / 100
    assert ratio.std() / 100 < 0.02


def test_partly_missing_rows_are_as_if_not_observed():
    y = TURN.simulate(2, 8)
    y[::2, 0] = np.nan
    y[3] = np.nan
    means, covs, log_evidence = TURN.kalman(y)
    run = si.filter(jax.random.key(3), TURN.space(), method=BOOTSTRAP, num_members=20_000, y=np.ma.masked_invalid(y))
    assert moments_off(run, means, covs) < 5
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=0.15)


LAWS = {
    "poisson": (lambda t, x: dist.Poisson(jnp.exp(x)), 3.0, lambda x: stats.poisson.logpmf(3, np.exp(x))),
    "bernoulli": (lambda t, x: dist.Bernoulli(logits=2 * x), 1.0, lambda x: -np.log1p(np.exp(-2 * x))),
    "student": (lambda t, x: dist.StudentT(3.0, x, 0.3), 2.0, lambda x: stats.t(3, x, 0.3).logpdf(2.0)),
    "bounded": (
        lambda t, x: dist.TruncatedNormal(x, 0.5, low=0.0),
        0.2,
        lambda x: stats.norm(x, 0.5).logpdf(0.2) - stats.norm.logsf(0.0, x, 0.5),
    ),
    "arctan": (lambda t, x: dist.Normal(jnp.arctan(x), 0.1), 0.9, lambda x: stats.norm(np.arctan(x), 0.1).logpdf(0.9)),
}  # fmt: skip


def grid_answer(log_likelihood, mean=0.0, sd=np.hypot(0.9, 0.6)):
    """Mean, sd and log evidence of one observation of a normal state, on a fine grid."""
    x = np.linspace(mean - 12 * sd, mean + 12 * sd, 200_001)
    density = stats.norm(mean, sd).pdf(x) * np.exp(log_likelihood(x))
    total = np.trapezoid(density, x)
    first = np.trapezoid(density * x, x) / total
    return first, np.sqrt(np.trapezoid(density * (x - first) ** 2, x) / total), np.log(total)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_is_exact(name):
    law, y, log_likelihood = LAWS[name]
    mean, sd, log_evidence = grid_answer(log_likelihood)
    space = si.StateSpace(dist.Normal(0.0, 1.0), lambda t0, t1, x: dist.Normal(0.9 * x, 0.6), law)
    run = si.filter(jax.random.key(0), space, method=BOOTSTRAP, num_members=20_000, y=np.array([y]))
    weight = np.asarray(jax.nn.softmax(run.analysis.log_weight[0]), np.float64)
    error = sd * np.sqrt((weight**2).sum())
    assert abs(float(run.mean()[0]) - mean) < 5 * error
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=5 * float(np.sqrt((weight**2).sum())))
