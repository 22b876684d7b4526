"""Langevin kernels: invariance, the known bias of the unadjusted ones, adaptation, and NumPyro's contract."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, Predictive
from scipy import stats

import scoreinfer as si
from doubles import Y1, Y2, grid_moments, location_scale

FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}
KERNELS = [si.mcmc.MALA, si.mcmc.UnderdampedLangevin]


def run(kernel, *args, key=0, init_params=None, **options):
    defaults = {"num_warmup": 0, "num_samples": 100, "num_chains": 1, "chain_method": "vectorized"}
    mcmc = MCMC(kernel, **(defaults | options), progress_bar=False)
    mcmc.run(random.key(key), *args, init_params=init_params)
    return mcmc


def assert_draws(sites, y, sigmas=5):
    for name, (mean, sd) in grid_moments(y).items():
        for values, truth in ((sites[name], mean), ((sites[name] - mean) ** 2, sd**2)):
            values = np.asarray(values, np.float64)
            error = values.std() / np.sqrt(effective_sample_size(values))
            assert abs(values.mean() - truth) < sigmas * error, f"{name}: {(values.mean() - truth) / error:.1f} sigma"


def with_residual(y):
    """A deterministic site that depends on the data."""
    a = numpyro.sample("a", dist.Normal())
    numpyro.deterministic("rest", numpyro.sample("y", dist.Normal(a, 1.0), obs=y) - a)


def test_deterministic_sites_see_the_data():
    mcmc = run(si.mcmc.MALA(with_residual), 1.0)
    for y in (1.0, 2.0):
        mcmc.run(random.key(0), y)
        sites = mcmc.get_samples()
        np.testing.assert_allclose(sites["rest"], y - sites["a"], atol=1e-6)


def log_gamma(z):
    """Minus the log density of log G, G ~ Gamma(3, 1)."""
    return -(3.0 * z - jnp.exp(z)).sum()


def p_value_after(kernel, num_steps=10, num_chains=4000):
    """Start chains from exact draws, move them, and compare where they end with the exact distribution."""
    start = np.log(np.random.default_rng(0).gamma(3.0, size=(num_chains, 1))).astype(np.float32)
    mcmc = run(kernel, init_params=jnp.asarray(start), num_samples=num_steps, num_chains=num_chains)
    ends = np.asarray(mcmc.get_samples(group_by_chain=True), np.float64)[:, -1, 0]
    assert np.mean(ends != start[:, 0]) > 0.9
    return stats.kstest(np.exp(ends), stats.gamma(3.0).cdf).pvalue


@pytest.mark.parametrize(
    "kernel",
    [
        si.mcmc.MALA(potential_fn=log_gamma, step_size=1.2, **FIXED),
        si.mcmc.UnderdampedLangevin(potential_fn=log_gamma, step_size=1.0, friction=0.7, **FIXED),
        si.mcmc.UnderdampedLangevin(potential_fn=log_gamma, step_size=0.6, friction=10.0, **FIXED),
    ],
    ids=["MALA", "underdamped", "much friction"],
)
def test_exact_starts_stay_exact(kernel):
    assert p_value_after(kernel) > 1e-3


@pytest.mark.parametrize(
    "kernel",
    [
        si.mcmc.ULA(potential_fn=log_gamma, step_size=1.2, **FIXED),
        si.mcmc.UnderdampedLangevin(potential_fn=log_gamma, step_size=1.6, adjusted=False, **FIXED),
    ],
    ids=["ULA", "underdamped"],
)
def test_unadjusted_kernels_leave_it(kernel):
    """The test above has the power to see a missing Metropolis test."""
    assert p_value_after(kernel) < 1e-6


def gaussian_variance(kernel, num_samples=4000, num_chains=50):
    mcmc = run(kernel, init_params=jnp.zeros((num_chains, 2)), num_samples=num_samples, num_chains=num_chains)
    return np.asarray(mcmc.get_samples(group_by_chain=True))[:, 200:].reshape(-1, 2).var(axis=0)


SCALES = np.array([1.0, 0.5])


def gaussian(x):
    return 0.5 * jnp.sum((x / SCALES) ** 2)


def test_bias_of_ula_is_the_closed_form():
    step = 0.7
    expected = SCALES**2 / (1.0 - step**2 / (4.0 * SCALES**2))
    found = gaussian_variance(si.mcmc.ULA(potential_fn=gaussian, step_size=step, **FIXED))
    assert np.allclose(found, expected, rtol=0.05)
    assert np.all(found > 1.1 * SCALES**2)


def test_unadjusted_baoab_has_the_right_variance_of_a_gaussian():
    kernel = si.mcmc.UnderdampedLangevin(potential_fn=gaussian, step_size=0.7, adjusted=False, **FIXED)
    assert np.allclose(gaussian_variance(kernel), SCALES**2, rtol=0.05)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", [si.mcmc.ULA, si.mcmc.MALA, si.mcmc.UnderdampedLangevin])
def test_adaptation_reaches_its_target(kind, dense):
    """Ten dimensions, scales from 0.2 to 5, correlated where the mass matrix may be dense."""
    root = np.diag(np.geomspace(0.2, 5.0, 10))
    if dense:
        root = root @ (np.eye(10) + 0.3 * np.tri(10, k=-1))
    precision = np.linalg.inv(root @ root.T)
    kernel = kind(potential_fn=lambda x: 0.5 * x @ precision @ x, dense_mass=dense)
    options = {"num_warmup": 3000, "num_samples": 2000, "num_chains": 4}
    mcmc = run(kernel, init_params=jnp.ones((4, 10)), **options)
    accept = np.asarray(mcmc.get_extra_fields()["accept_prob"]).mean()
    assert abs(accept - kernel.target_accept_prob) < 0.05
    if kind is si.mcmc.ULA:
        return  # its small steps explore too slowly for the widest axes
    inverse_mass = np.asarray(mcmc.last_state.adapt_state.inverse_mass_matrix).mean(0)
    expected = root @ root.T if dense else np.diag(root @ root.T)
    variances = np.diag(inverse_mass) if dense else inverse_mass
    assert np.allclose(np.log(variances), np.log(np.diag(root @ root.T)), atol=0.5)
    if dense:
        whitened = np.linalg.solve(np.linalg.cholesky(expected), np.linalg.cholesky(inverse_mass))
        assert np.linalg.cond(whitened) < 5


@pytest.mark.parametrize("kind", KERNELS)
def test_model_with_data(kind):
    """Warm up on other data than the run's: the answer is for the run's."""
    mcmc = MCMC(kind(location_scale), num_warmup=1000, num_samples=4000, num_chains=4, chain_method="vectorized",
                progress_bar=False)  # fmt: skip
    mcmc.warmup(random.key(0), Y2)
    mcmc.run(random.key(1), Y1)
    assert_draws(mcmc.get_samples(group_by_chain=True), Y1)
    assert Predictive(location_scale, mcmc.get_samples())(random.key(0))["y"].shape == (16_000, 5)


@pytest.mark.parametrize("method", ["sequential", "parallel", jax.vmap], ids=["sequential", "parallel", "vmap"])
def test_chain_methods_agree(method):
    options = {"num_warmup": 20, "num_samples": 20, "num_chains": 2}
    kernel = si.mcmc.MALA(location_scale)
    expected = run(kernel, Y1, **options).get_samples()
    found = run(kernel, Y1, **options, chain_method=method).get_samples()
    assert set(found) == {"mu", "sigma", "log_sigma"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-3)


def test_data_may_change_inside_one_compiled_loop():
    mcmc = MCMC(si.mcmc.MALA(location_scale), num_warmup=300, num_samples=1000, jit_model_args=True, progress_bar=False)
    for y in (Y1, Y2):
        mcmc.run(random.key(0), y)
        mean, sd = grid_moments(y)["mu"]
        assert abs(mcmc.get_samples()["mu"].mean() - mean) < sd


def test_pickle_and_start_where_told():
    mcmc = run(si.mcmc.UnderdampedLangevin(location_scale), Y1, num_warmup=10, num_samples=10)
    again = pickle.loads(pickle.dumps(mcmc))
    again.post_warmup_state = again.last_state
    again.run(random.key(1), Y1)
    start = {"mu": jnp.array(3.0), "sigma": jnp.array(-1.0)}
    state = si.mcmc.MALA(location_scale).init(random.key(0), 0, start, model_args=(Y1,), model_kwargs={})
    assert state.z["mu"] == 3.0 and state.z["sigma"] == -1.0
    with pytest.raises(ValueError, match="sizes"):
        si.mcmc.MALA(location_scale).init(random.key(0), 0, {"mu": jnp.array(1.0)}, model_args=(Y1,), model_kwargs={})


def test_potential_needs_a_start_and_a_kernel_a_target():
    with pytest.raises(ValueError, match="init_params"):
        run(si.mcmc.MALA(potential_fn=gaussian))
    with pytest.raises(ValueError, match="either"):
        si.mcmc.ULA()


def test_walls_are_not_crossed():
    """A density that is not finite beyond a wall: counted as divergences, never visited."""

    def walled(x):
        return jnp.where(x > 0.0, x, jnp.nan).sum()

    for kernel in (
        si.mcmc.ULA(potential_fn=walled, step_size=1.0, **FIXED),
        si.mcmc.MALA(potential_fn=walled, step_size=1.0, **FIXED),
    ):
        mcmc = run(kernel, init_params=jnp.ones((4, 1)), num_samples=500, num_chains=4)
        assert np.all(mcmc.get_samples() > 0.0)
        assert mcmc.get_extra_fields()["diverging"].sum() > 10
