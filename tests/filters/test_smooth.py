"""Smoothing, gradients, ArviZ, and terms of diffrax."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import scoreinfer as si
from filters.linear import AR1, PARTLY

BOOTSTRAP = si.filters.BootstrapFilter()
Y = AR1.simulate(5, 8)


def test_paths_are_those_of_the_kalman_smoother():
    """Means, variances and the covariance of neighbours, in standard errors of the paths drawn."""
    y, num = PARTLY.simulate(4, 6), 2000
    means, covs = PARTLY.smooth(y)
    run = si.filter(jax.random.key(0), PARTLY.space(), method=BOOTSTRAP, num_members=4000, y=y)
    paths = np.asarray(si.smooth(jax.random.key(1), run, num=num), np.float64)
    variance = np.diagonal(covs, axis1=1, axis2=2)
    error = 5 * np.sqrt(2.0 / num)  # members are as many as paths, twice over: both have noise
    assert np.abs((paths.mean(axis=0) - means) / np.sqrt(variance)).max() < error
    assert np.abs(paths.var(axis=0) / variance - 1).max() < error * np.sqrt(2)
    filtered = PARTLY.kalman(y)[0]
    assert np.abs((filtered - means) / np.sqrt(variance)).max() > 2 * error  # smoothing matters here


def test_smoothing_without_a_density_is_refused():
    space = si.StateSpace(dist.Normal(0.0, 1.0), lambda key, t0, t1, x: x, lambda t, x: dist.Normal(x, 1.0))
    run = si.filter(jax.random.key(0), space, method=BOOTSTRAP, num_members=10, y=np.ones(3))
    with pytest.raises(ValueError, match="needs the density of the transition, and this model only simulates it"):
        si.smooth(jax.random.key(1), run, num=5)


def slope_space(slope):
    return si.StateSpace(
        dist.Normal(jnp.zeros(1), 1.0).to_event(1),
        lambda t0, t1, x: dist.Normal(slope * x, AR1.noise).to_event(1),
        lambda t, x: dist.Normal(x, AR1.error).to_event(1),
    )


@pytest.mark.parametrize("method", [si.filters.EnKF(), si.filters.LETKF()], ids=["EnKF", "LETKF"])
def test_gradient_of_the_evidence_is_that_of_the_kalman_filter(method):
    def log_evidence(slope):
        return si.filter(jax.random.key(0), slope_space(slope), method=method, num_members=2000, y=Y).log_evidence

    found = jax.jit(jax.grad(log_evidence))(0.6)
    step = 1e-4
    exact = [AR1._replace(move=np.array([[0.6 + s]])).kalman(Y)[2] for s in (-step, step)]
    assert float(found) == pytest.approx((exact[1] - exact[0]) / (2 * step), abs=0.1)


def test_evidence_is_a_factor_of_a_model():
    """NUTS finds the slope's posterior, which a grid of Kalman evidences knows."""

    def model():
        slope = numpyro.sample("slope", dist.Uniform(0.0, 1.0))
        run = si.filter(jax.random.key(0), slope_space(slope), method=si.filters.LETKF(), num_members=200, y=Y)
        numpyro.factor("y", run.log_evidence)

    mcmc = MCMC(NUTS(model), num_warmup=100, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(1))
    grid = (np.arange(200) + 0.5) / 200
    density = np.exp([AR1._replace(move=np.array([[s]])).kalman(Y)[2] for s in grid])
    weight = density / density.sum()
    mean, sd = weight @ grid, np.sqrt(weight @ grid**2 - (weight @ grid) ** 2)
    assert abs(float(mcmc.get_samples()["slope"].mean()) - mean) < 5 * sd / np.sqrt(50)


def test_runs_go_to_arviz():
    run = si.filter(jax.random.key(0), AR1.space(), method=BOOTSTRAP, num_members=500, y=Y)
    data = si.to_arviz(jax.random.key(1), run)
    assert data["posterior"]["x"].dims == ("chain", "draw", "time", "x_dim_0")
    assert data["posterior"]["x"].shape == (1, 500, 8, 1) and data["observed_data"]["y"].dims == ("time", "entry")
    assert data["posterior"]["time"].values.tolist() == run.ts.tolist()
    assert data["posterior"].attrs["log_evidence_kind"] == "unbiased"
    np.testing.assert_allclose(data["posterior"]["x"].mean(("chain", "draw")), run.mean(), atol=0.02)
    raw = run.to_arviz(jax.random.key(1), resample=False)
    np.testing.assert_array_equal(raw["prior"]["x"].values[0], np.asarray(run.forecast.x).swapaxes(0, 1))
    np.testing.assert_array_equal(raw["sample_stats"]["log_weight"].values[0].T, run.analysis.log_weight)
    with pytest.raises(ValueError, match="run of a filter takes"):
        si.to_arviz(jax.random.key(1), run, num_chains=2)


# --- terms of diffrax

DRIFT = diffrax.ODETerm(lambda t, x, rate: -rate * x)
BROWNIAN = diffrax.UnsafeBrownianPath((2,), jax.random.key(0))
NOISE = diffrax.ControlTerm(lambda t, x, rate: jnp.array([[0.3, 0.0], [0.0, 0.1]]), BROWNIAN)
PAIR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)


def test_terms_become_a_path():
    terms = diffrax.MultiTerm(DRIFT, NOISE)
    path = si.PhysicsPath.from_diffrax(terms, diffrax.Tsit5(), [0.0, 0.5, 2.0], PAIR, num_steps=4, args=2.0)
    np.testing.assert_allclose(path.noise_scale, np.sqrt([[0.5], [1.5]]) * [0.3, 0.1], rtol=1e-5)
    np.testing.assert_allclose(path.step(0.0, 0.5, jnp.ones(2)), np.exp(-1.0), rtol=1e-4)
    with pytest.raises(ValueError, match="these terms are an ordinary differential equation"):
        si.PhysicsPath.from_diffrax(DRIFT, diffrax.Tsit5(), [0.0, 1.0], PAIR)
    mixed = diffrax.ControlTerm(lambda t, x, rate: jnp.array([[0.3, 0.2], [0.0, 0.1]]), BROWNIAN)
    with pytest.raises(ValueError, match="mixes components"):
        si.PhysicsPath.from_diffrax(diffrax.MultiTerm(DRIFT, mixed), diffrax.Tsit5(), [0.0, 1.0], PAIR)
    with pytest.raises(TypeError, match="Expected an `ODETerm`, or `MultiTerm"):
        si.process.from_diffrax(NOISE, diffrax.Euler())


def test_terms_become_a_transition():
    """The Ornstein-Uhlenbeck process: mean and variance are known."""
    num, t = 4000, (jnp.array(0.0), jnp.array(1.0))
    move = si.process.from_diffrax(diffrax.MultiTerm(DRIFT, NOISE), diffrax.EulerHeun(), num_steps=32, args=1.0)
    drawn = np.asarray(jax.vmap(lambda key: move(key, *t, jnp.ones(2)))(jax.random.split(jax.random.key(1), num)))
    sd = np.sqrt((1 - np.exp(-2.0)) / 2) * np.array([0.3, 0.1])
    assert np.abs((drawn.mean(axis=0) - np.exp(-1.0)) / sd).max() < 5 / np.sqrt(num) + 0.02
    assert np.abs(drawn.var(axis=0) / sd**2 - 1).max() < 5 * np.sqrt(2 / num) + 0.02
    space = si.StateSpace(
        PAIR, si.process.from_diffrax(DRIFT, diffrax.Tsit5(), args=1.0), lambda t, x: dist.Normal(x, 1.0)
    )
    run = si.filter(jax.random.key(0), space, method=si.filters.EnKF(), num_members=50, y=np.zeros((3, 2)))
    np.testing.assert_allclose(run.forecast.x[1], run.analysis.x[0] * np.exp(-1.0), rtol=1e-3)
