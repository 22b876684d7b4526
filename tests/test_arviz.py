"""Draws go to ArviZ with the right weights, aligned with their densities, in both generations of ArviZ."""

import json
from dataclasses import replace
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreinfer.arviz import to_arviz
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.problem import Problem, Site

# A linear-Gaussian problem: z ~ N(0, I) in two dimensions, y_i ~ N(z_0 + z_1 t_i, NOISE^2).
TIMES = jnp.linspace(-1.0, 1.0, 6)
DESIGN = jnp.stack([jnp.ones(6), TIMES], axis=1)
NOISE = 0.7
OBSERVED = {"y": jnp.array([0.3, -0.2, 0.9, 0.4, 1.5, 1.1])}
COVARIANCE = jnp.linalg.inv(jnp.eye(2) + DESIGN.T @ DESIGN / NOISE**2)
MEAN = COVARIANCE @ DESIGN.T @ OBSERVED["y"] / NOISE**2
NUM = 2000


def normal(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)


def constrain(z):
    return {"intercept": z[0], "slope": z[1], "end": jnp.stack([z[0] - z[1], z[0] + z[1]])}


def simulate_observation(key, z):
    return {"y": DESIGN @ z + NOISE * jax.random.normal(key, (6,))}


def simulate(key):
    key_z, key_y = jax.random.split(key)
    z = jax.random.normal(key_z, (2,))
    return z, simulate_observation(key_y, z)


def pointwise(z, y):
    return {"y": normal(y["y"], DESIGN @ z, NOISE)}


PROBLEM = Problem(
    dim=2,
    latents=(Site("intercept", (), "float32", "real", 1), Site("slope", (), "float32", "real", 1)),
    observed=(Site("y", (6,), "float32", "real"),),
    log_prior=lambda z: normal(z, 0.0, 1.0).sum(),
    log_likelihood=lambda z, y: pointwise(z, y)["y"].sum(),
    constrain=constrain,
    latent_sites=lambda z: {"intercept": z[0], "slope": z[1]},
    unconstrain=lambda sites: jnp.stack([sites["intercept"], sites["slope"]]),
    simulate=simulate,
    simulate_observation=simulate_observation,
    encode=lambda y: y,
    read=lambda args, kwargs: kwargs,
    pointwise_log_likelihood=pointwise,
)


class Verdict(NamedTuple):
    """A stand-in certificate."""

    certified: bool = True
    ess: float = 812.5
    k_hat: float = 0.21
    log_evidence: float = -7.5
    log_evidence_se: float | None = None
    reason: str = ""


@pytest.fixture(scope="module")
def draws():
    """Weighted draws from a proposal that is off: wider than the posterior, and beside it."""
    scale = 1.4 * jnp.sqrt(jnp.diag(COVARIANCE))
    values = MEAN + 0.1 + scale * jax.random.normal(jax.random.key(0), (NUM, 2))
    log_q = normal(values, MEAN + 0.1, scale).sum(-1)
    log_joint = jax.vmap(PROBLEM.log_joint, (0, None))(values, OBSERVED)
    info = DrawInfo(NUM, num_score_evaluations=32, num_simulations=10_000, seconds=1.5)
    sites, log_weight = jax.vmap(constrain)(values), log_joint - log_q
    return Draws(sites, values, log_weight, log_q, log_joint, OBSERVED, Verdict(), info, PROBLEM)


@pytest.fixture(scope="module")
def data(draws):
    return to_arviz(
        jax.random.key(1),
        draws,
        log_likelihood=True,
        predictive=True,
        prior=500,
        coords={"time": np.asarray(TIMES)},
        dims={"y": ["time"]},
    )


def kish(draws):
    weight = np.exp(np.asarray(draws.log_weight) - np.max(draws.log_weight))
    return weight.sum() ** 2 / (weight**2).sum()


def test_groups_and_dimensions(data):
    for group in ("posterior", "sample_stats", "observed_data", "log_likelihood", "prior", "posterior_predictive"):
        assert group in data
    assert data["posterior"]["slope"].dims == ("chain", "draw")
    assert data["posterior"]["end"].shape == (1, NUM, 2)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "time")
    assert data["prior"]["slope"].shape == (1, 500)
    assert data["prior_predictive"]["y"].shape == (1, 500, 6)
    np.testing.assert_array_equal(data["observed_data"]["y"], OBSERVED["y"])
    np.testing.assert_allclose(data["observed_data"]["time"], TIMES)


def test_resampled_posterior_has_the_exact_moments(draws, data):
    """The proposal's own mean is wrong by 30 standard errors; the resampled one is right within five."""
    for name, mean, variance in zip(("intercept", "slope"), MEAN, jnp.diag(COVARIANCE), strict=True):
        chain = np.asarray(data["posterior"][name])
        assert abs(chain.mean() - mean) < 5 * np.sqrt(variance / kish(draws))
        assert abs(chain.var() - variance) < 5 * variance * np.sqrt(2 / kish(draws))


def test_rows_stay_aligned(data):
    """Every density in sample_stats belongs to the draw it stands beside, and so does every derived group."""
    posterior, stats = data["posterior"], data["sample_stats"]
    z = jnp.stack([posterior["intercept"].to_numpy(), posterior["slope"].to_numpy()], -1)
    log_joint = jax.vmap(jax.vmap(PROBLEM.log_joint, (0, None)), (0, None))(z, OBSERVED)
    np.testing.assert_allclose(stats["lp"], log_joint, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(posterior["end"][..., 1], z.sum(-1), rtol=1e-5, atol=1e-5)
    expected = jax.vmap(jax.vmap(pointwise, (0, None)), (0, None))(z, OBSERVED)["y"]
    np.testing.assert_allclose(data["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-4)
    residual = data["posterior_predictive"]["y"].to_numpy() - z @ DESIGN.T
    assert abs(residual.mean()) < 5 * NOISE / np.sqrt(residual.size)
    assert abs(residual.var() / NOISE**2 - 1) < 5 * np.sqrt(2 / residual.size)


def test_prior_groups_follow_the_prior(data):
    slope, y = data["prior"]["slope"].to_numpy().ravel(), data["prior_predictive"]["y"].to_numpy()[0]
    assert abs(slope.mean()) < 5 / np.sqrt(500)
    assert abs(slope.var() - 1) < 5 * np.sqrt(2 / 500)
    assert np.corrcoef(slope, y[:, -1] - y[:, 0])[0, 1] > 0.8  # the same rows


def test_effective_sample_size_sees_the_copies(draws, data):
    """Copies stand side by side, so ArviZ reports about N^2 / sum n_i^2 for n_i copies, and not the number of draws."""
    _, copies = np.unique(data["posterior"]["slope"], return_counts=True)
    expected = NUM**2 / (copies**2).sum()
    assert expected < 0.8 * NUM
    assert expected < kish(draws)
    size = float(az.ess(data["posterior"], var_names=["slope"])["slope"])
    assert abs(size / expected - 1) < 0.2  # the estimator's own error: about 5 % at 2000 draws


def exact_loo():
    """Compute sum_i log p(y_i | y_-i), by leaving each observation out of the linear-Gaussian posterior."""
    total = 0.0
    for i in range(6):
        rest = np.delete(np.arange(6), i)
        covariance = np.linalg.inv(np.eye(2) + DESIGN[rest].T @ DESIGN[rest] / NOISE**2)
        mean = covariance @ DESIGN[rest].T @ OBSERVED["y"][rest] / NOISE**2
        scale = np.sqrt(DESIGN[i] @ covariance @ DESIGN[i] + NOISE**2)
        total += float(normal(OBSERVED["y"][i], DESIGN[i] @ mean, scale))
    return total


def loo_error(draws):
    """Bound the Monte Carlo error of leave-one-out: its terms are harmonic means of the likelihood."""
    ratio = 1 / np.exp(jax.vmap(pointwise, (0, None))(draws.unconstrained, OBSERVED)["y"])
    weight = np.exp(np.asarray(draws.log_weight) - np.max(draws.log_weight))[:, None]
    mean = (weight * ratio).sum(0) / weight.sum()
    relative = np.sqrt((weight**2 * (ratio - mean) ** 2).sum(0)) / weight.sum() / mean
    return 5 * relative.sum()


def test_loo_is_exact_on_the_oracle(draws, data):
    assert loo_error(draws) < 0.5
    result = az.loo(data)
    elpd = result["elpd_loo"] if "elpd_loo" in dir(result) else result.elpd
    assert abs(float(elpd) - exact_loo()) < loo_error(draws)


@pytest.mark.skipif(not hasattr(az, "loo_approximate_posterior"), reason="ArviZ 1.x has it")
def test_weighted_loo_is_exact_on_the_oracle(draws):
    """The proposal's draws with their densities give the same leave-one-out as the resampled ones."""
    data = to_arviz(jax.random.key(0), draws, resample=False, log_likelihood=True)
    stats = data["sample_stats"]
    result = az.loo_approximate_posterior(data, log_p=stats["lp"], log_q=stats["log_q"])
    assert abs(float(result.elpd) - exact_loo()) < loo_error(draws)


def test_summary_works(data):
    table = az.summary(data)
    assert abs(float(table.loc["slope", "mean"]) - MEAN[1]) < 5 * np.sqrt(COVARIANCE[1, 1] / 1000)


def test_weighted_keeps_the_proposal(draws):
    data = to_arviz(jax.random.key(0), draws, resample=False, num_chains=3)
    assert data["posterior"]["slope"].shape == (3, 666)
    np.testing.assert_array_equal(data["posterior"]["slope"].to_numpy().ravel(), draws.sites["slope"][:1998])
    np.testing.assert_array_equal(data["sample_stats"]["log_weight"].to_numpy().ravel(), draws.log_weight[:1998])
    assert data["posterior"].attrs["weighted"] == 1


def test_without_density_nothing_is_resampled(draws):
    data = to_arviz(jax.random.key(0), draws._replace(log_weight=None, log_joint=None))
    np.testing.assert_array_equal(data["posterior"]["slope"].to_numpy().ravel(), draws.sites["slope"])
    assert set(data["sample_stats"].data_vars) == {"log_q"}


def test_same_key_same_groups(draws, data):
    """Also whatever other groups are asked for."""
    again = to_arviz(jax.random.key(1), draws, predictive=True)
    np.testing.assert_array_equal(again["posterior"]["slope"], data["posterior"]["slope"])
    np.testing.assert_array_equal(again["posterior_predictive"]["y"], data["posterior_predictive"]["y"])
    other = to_arviz(jax.random.key(2), draws)
    assert not np.array_equal(other["posterior"]["slope"], data["posterior"]["slope"])


def test_both_key_styles(draws):
    assert "posterior" in to_arviz(jax.random.PRNGKey(0), draws, predictive=True, prior=8)


def test_attributes(data):
    attrs = data["posterior"].attrs
    assert attrs["inference_library"] == "scoreinfer"
    assert {"numpyro_version", "jax_version", "inference_library_version"} <= set(attrs)
    assert attrs["num_simulations"] == 10_000
    assert attrs["num_score_evaluations"] == 32
    assert attrs["seconds"] == 1.5
    assert "num_failed" not in attrs  # not known
    assert attrs["certificate_certified"] == 1
    assert attrs["certificate_k_hat"] == 0.21
    assert attrs["certificate_reason"] == ""
    assert "certificate_log_evidence_se" not in attrs
    assert "prove nothing" in attrs["note"]
    plain = {name: value for name, value in attrs.items() if not isinstance(value, np.ndarray)}
    assert json.loads(json.dumps(plain)) == plain


def test_netcdf_round_trip(data, tmp_path):
    data.to_netcdf(str(tmp_path / "draws.nc"))
    back = az.from_netcdf(str(tmp_path / "draws.nc"))
    for group in ("posterior", "sample_stats", "observed_data", "log_likelihood", "prior_predictive"):
        for name in data[group].data_vars:
            np.testing.assert_array_equal(back[group][name], data[group][name])
    for name, value in data["posterior"].attrs.items():
        np.testing.assert_array_equal(back["posterior"].attrs[name], value)


def test_pointwise_dictionary_is_taken_as_it_is(draws, data):
    given = {"y": jax.vmap(pointwise, (0, None))(draws.unconstrained, OBSERVED)["y"]}
    built = to_arviz(jax.random.key(1), draws, log_likelihood=given)
    np.testing.assert_allclose(built["log_likelihood"]["y"], data["log_likelihood"]["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "problem", "message"),
    [
        ({"num_chains": NUM + 1}, PROBLEM, f"between 1 and the number of draws, {NUM}, got {NUM + 1}"),
        ({"prior": 3}, None, "hold no problem"),
        (
            {"resample": False, "log_likelihood": True},
            replace(PROBLEM, pointwise_log_likelihood=None),
            "Pass a dictionary of arrays",
        ),
        (
            {"predictive": True},
            replace(PROBLEM, simulate=None, simulate_observation=None, not_simulable="factor sites"),
            "can be simulated: factor sites",
        ),
    ],
)
def test_errors_name_the_way_out(draws, arguments, problem, message):
    with pytest.raises(ValueError, match=message):
        to_arviz(jax.random.key(0), draws._replace(problem=problem), **arguments)
