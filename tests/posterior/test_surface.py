"""What a posterior offers a user: its model's own arguments, options apart from them, samples, predictions, ArviZ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from oracles import disagreement, linear_gaussian
from scoreinfer.samplers.base import Target

SMALL = {"width": 8, "depth": 1, "num_steps": 50, "batch_size": 128, "progress_bar": False}
ORACLE, NOISE = linear_gaussian(2, 0.5), 0.5
MATRIX = np.array([[1.0, 0.5], [-0.3, 1.0]])


def model(width, likelihood, *, batch_size, windows=1.0, num_steps=0.0, y=None):
    """The linear Gaussian, every number of it an argument that is called like an option of the package."""
    theta = numpyro.sample("theta", dist.Normal(jnp.zeros(2), width).to_event(1))
    mean = windows * jnp.asarray(MATRIX, jnp.float32) @ theta + num_steps
    numpyro.sample("y", dist.Normal(mean, likelihood * batch_size).to_event(1), obs=y)


OWN = {"width": 1.0, "likelihood": 0.25, "batch_size": 2.0, "windows": 1.0, "num_steps": 0.0}
"""With these it is the oracle."""


@pytest.fixture(scope="module")
def posterior():
    """Linear, so that regression is nearly the answer."""
    return si.NPSE(model, **SMALL).fit(jax.random.key(0), **OWN)


@pytest.fixture(scope="module")
def conditioned(posterior):
    return posterior.condition(**OWN, **ORACLE.data)


@pytest.fixture(scope="module")
def draws(conditioned):
    """Half of them from the prior: weights that say much."""
    return conditioned.sample(jax.random.key(1), 4000, prior_fraction=0.5)


def test_models_name_their_arguments_as_they_like(posterior, conditioned, draws, tmp_path):
    """Arguments called like options reach the model, by position or name, in every call that takes arguments."""
    truth = ORACLE.truth(ORACLE.data)
    assert draws.certificate.certified and draws.certificate.ess > 1000
    assert abs(draws.certificate.log_evidence - truth.log_evidence) < 5 * draws.certificate.log_evidence_se
    assert disagreement(truth, ORACLE.flat(draws.sites), draws.log_weight) < 5
    first = posterior.sample(jax.random.key(2), 500, **OWN, **ORACLE.data)
    same = posterior.condition(1.0, 0.25, batch_size=2.0, **ORACLE.data).sample(jax.random.key(2), 500, batch_size=512)
    np.testing.assert_array_equal(first.unconstrained, same.unconstrained)
    posterior.save(tmp_path / "p")
    loaded = si.NPSE(model).load(tmp_path / "p", **OWN)
    again = loaded.sample(jax.random.key(2), 500, **OWN, **ORACLE.data)
    np.testing.assert_array_equal(first.log_weight, again.log_weight)
    with pytest.raises(ValueError, match="other densities"):
        si.NPSE(model).load(tmp_path / "p", **OWN | {"width": 3.0})
    assert conditioned.posterior is posterior


def test_options_are_no_arguments_of_the_model(posterior, conditioned):
    """And the model's arguments are none of `sample`: what is neither is refused."""
    with pytest.raises(TypeError, match="thorough"):
        posterior.condition(**OWN, **ORACLE.data, thorough=True)
    with pytest.raises(TypeError, match="width"):
        conditioned.sample(jax.random.key(1), 10, width=1.0)
    with pytest.raises(TypeError, match="unknown"):
        si.NPSE(model, unknown=1)


def test_samples_are_the_weighted_draws(draws):
    """Equally weighted, as many as there are, each one of the draws, and without random numbers."""
    samples = draws.get_samples()
    assert samples.keys() == draws.sites.keys() and samples["theta"].shape == (4000, 2)
    np.testing.assert_array_equal(samples["theta"], draws.get_samples()["theta"])
    theta, z = np.asarray(samples["theta"], np.float64), np.asarray(draws.sites["theta"], np.float64)
    kept, counts = np.unique(theta, axis=0, return_counts=True)
    assert len(np.unique(np.concatenate([kept, z]), axis=0)) == len(np.unique(z, axis=0))
    weight = np.exp(np.asarray(draws.log_weight, np.float64))
    weight *= draws.num / weight.sum()
    by_value = dict(zip(map(tuple, kept), counts, strict=True))
    copies = np.array([by_value.get(tuple(row), 0) for row in z])
    assert np.abs(copies - weight)[weight < np.quantile(weight, 0.9)].max() < 2  # but for smoothing of the largest
    # Rounding copies to whole numbers: less than one of each draw, at random if anything.
    error = 0.5 * np.sqrt((z**2).sum(0)) / draws.num
    assert (np.abs(theta.mean(0) - weight @ z / draws.num) < 5 * error).all()
    assert disagreement(ORACLE.truth(ORACLE.data), theta, ess=draws.certificate.ess) < 5


def test_draws_of_other_data_are_refused(posterior, conditioned, draws):
    other = posterior.condition(**OWN, y=ORACLE.data["y"] + 1.0)
    with pytest.raises(ValueError, match=r"draws of other data: y of `draws\.observed` differ"):
        other.predict(jax.random.key(0), 10, draws=draws)
    missing = draws._replace(observed={})
    with pytest.raises(ValueError, match="other data: y of"):
        conditioned.predict(jax.random.key(0), 10, draws=missing)


def test_samples_without_weights_are_the_draws(draws):
    plain = draws._replace(log_weight=None)
    np.testing.assert_array_equal(plain.get_samples()["theta"], draws.sites["theta"])


def test_samples_of_no_weight_are_refused(draws):
    nothing = draws._replace(log_weight=jnp.full(draws.num, -jnp.inf))
    with pytest.raises(ValueError, match="No draw has a positive weight"):
        nothing.get_samples()
    with pytest.raises(ValueError, match="No draw has a positive weight"):
        nothing.resample(jax.random.key(0), 10)


def predicted():
    """Mean and covariance of data to come: of the posterior's parameters, and noise."""
    truth = ORACLE.truth(ORACLE.data)
    return MATRIX @ truth.mean, MATRIX @ truth.covariance @ MATRIX.T + NOISE**2 * np.eye(2)


def in_errors(y):
    """Hold the moments of simulated data against the predictive distribution, in standard errors."""
    mean, covariance = predicted()
    y = np.asarray(y, np.float64)
    unit = np.linalg.solve(np.linalg.cholesky(covariance), (y - mean).T).T
    products = np.stack([unit[:, 0] ** 2 - 1, unit[:, 1] ** 2 - 1, unit[:, 0] * unit[:, 1]], axis=1)
    size = np.array([1.0, 1.0, 2**0.5, 2**0.5, 1.0])
    return np.concatenate([unit, products], axis=1).mean(0) / size * len(y) ** 0.5


def test_predictions_have_the_predictive_moments(conditioned, draws):
    num = 3000
    fresh = conditioned.predict(jax.random.key(3), num)
    assert fresh.keys() == {"y"} and fresh["y"].shape == (num, 2)
    assert np.abs(in_errors(fresh["y"])).max() < 5
    given = conditioned.predict(jax.random.key(4), num, draws=draws)
    shared = (1 + num / draws.certificate.ess) ** 0.5  # of the draws behind them, some more than once
    assert np.abs(in_errors(given["y"])).max() < 5 * shared
    again = conditioned.predict(jax.random.key(4), num, draws=draws)
    np.testing.assert_array_equal(given["y"], again["y"])


def test_draws_are_presented_to_arviz(conditioned, draws):
    options = {"predictive": True, "log_likelihood": True, "prior": 100}
    data = conditioned.to_arviz(jax.random.key(5), 1000, **options)
    theta = np.asarray(data["posterior"]["theta"])
    assert theta.shape == (1, 1000, 2)
    assert disagreement(ORACLE.truth(ORACLE.data), theta[0], ess=500) < 5
    np.testing.assert_array_equal(data["observed_data"]["y"], ORACLE.data["y"])
    assert np.abs(in_errors(np.asarray(data["posterior_predictive"]["y"])[0])).max() < 5 * 2**0.5
    assert data["log_likelihood"]["y"].shape[:2] == (1, 1000) and data["prior"]["theta"].shape == (1, 100, 2)
    assert data["posterior"].attrs["certificate_certified"] == 1
    weighted = draws.to_arviz(jax.random.key(6), resample=False, num_chains=4)
    assert weighted["posterior"]["theta"].shape == (4, 1000, 2)
    np.testing.assert_array_equal(np.ravel(weighted["sample_stats"]["log_weight"]), draws.log_weight)


def test_predictions_need_a_simulator(conditioned):
    target = conditioned.target
    problem = dataclasses.replace(target.problem, simulate_observation=None, not_simulable="'f' is a factor.")
    bare = dataclasses.replace(conditioned, target=Target(problem, target.y))
    with pytest.raises(si.errors.UnsupportedModel, match=r"`predict` simulates data .*: 'f' is a factor"):
        bare.predict(jax.random.key(3), 10)
