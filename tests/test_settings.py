"""JAX's own settings: everything runs where `jit` is disabled, NaN is an error, or ranks are not promoted."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import scoreinfer as si

X, Y = np.array([0.5, 1.0, 2.0]), np.array([0.3, 1.0, 2.0])
TINY = {"num_steps": 20, "width": 16, "depth": 1, "progress_bar": False}


def model(x, y=None):
    a, s = numpyro.sample("a", dist.Normal(0, 1)), numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("n", 3):
        numpyro.sample("y", dist.Normal(a * x, s), obs=y)


def run(kernel, *args, num=2, num_chains=2):
    mcmc = MCMC(
        kernel, num_warmup=num, num_samples=num, num_chains=num_chains, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.key(0), *args)
    return np.concatenate([np.ravel(value) for value in mcmc.get_samples().values()])


STRICT = pytest.mark.parametrize(
    "setting",
    [pytest.param(lambda: jax.debug_nans(True), marks=pytest.mark.slow), lambda: jax.numpy_rank_promotion("raise")],
    ids=["nan", "rank"],
)


@STRICT
@pytest.mark.slow
def test_fitted_posteriors_run_under_strict_settings(setting):
    with setting():
        posterior = si.NPSE(model, **TINY).fit(jax.random.key(0), X)
        assert posterior.sample(jax.random.key(1), 100, X, Y).num == 100
        for kernel in (si.mcmc.MALA(model), si.ScoreSDE(posterior=posterior, bank_size=4)):
            assert np.isfinite(run(kernel, X, Y)).all()


@STRICT
@pytest.mark.slow
def test_one_posterior_is_learned_under_strict_settings(setting):
    with setting():
        assert np.isfinite(run(si.ScoreSDE(model, progress_bar=False), X, Y, num=5)).all()


@pytest.mark.slow
def test_everything_runs_where_jit_is_disabled():
    posterior = si.NPSE(model, **TINY).fit(jax.random.key(0), X)
    with jax.disable_jit():
        assert np.isfinite(run(si.mcmc.MALA(model), X, Y, num=1)).all()
        assert posterior.condition(X, Y).sample(jax.random.key(1), 2, batch_size=2).num == 2


@pytest.mark.slow
def test_models_with_run_time_checks():
    """Equinox's checks in diffrax fail where programs are traced with constants folded."""

    def decay(y=None):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        end = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, rate: -rate * x), diffrax.Heun(), 0.0, jnp.float32(1.0), 0.1, 1.0, rate,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3), max_steps=64,
        )  # fmt: skip
        numpyro.sample("y", dist.Normal(end.ys[-1], 0.1), obs=y)

    assert np.isfinite(run(si.mcmc.MALA(decay), 0.4)).all()
