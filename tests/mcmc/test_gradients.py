"""Densities whose gradient exists in forward mode alone, not at all, or is no number: what each method does."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

import scoreinfer as si
from doubles import GaussianProposal, fake_posterior, location_scale_problem
from scoreinfer.mcmc import ScoreSDE
from scoreinfer.model import from_numpyro
from scoreinfer.montecarlo.langevin import Differentiation, derivatives, differentiate, move_all
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import Target
from scoreinfer.samplers.explorer import Effort
from scoreinfer.samplers.single import learn
from scoreinfer.training.simulations import check_finite, has_gradient, simulate_joint

LANGEVIN = [si.mcmc.MALA, si.mcmc.ULA, si.mcmc.UnderdampedLangevin]
DATA = 1.7


def anomaly(mean):
    """Solve Kepler's equation E - sin(E) / 2 = mean by Newton steps, as many as are needed."""
    step = lambda e: e - (e - 0.5 * jnp.sin(e) - mean) / (1 - 0.5 * jnp.cos(e))  # noqa: E731
    return jax.lax.while_loop(lambda e: jnp.abs(e - 0.5 * jnp.sin(e) - mean) > 1e-5, step, mean + 0.25)


def outside_jax(mean):
    """The same, by a call out of JAX."""

    def solve(mean):
        mean = np.asarray(mean)
        e = mean + 0.25
        for _ in range(20):
            e = e - (e - 0.5 * np.sin(e) - mean) / (1 - 0.5 * np.cos(e))
        return e.astype(mean.dtype)

    return jax.pure_callback(solve, jax.ShapeDtypeStruct((), mean.dtype), mean, vmap_method="expand_dims")


def orbit(solve):
    def model(y=None):
        mean = numpyro.sample("mean", dist.Normal(1.0, 0.5))
        numpyro.sample("y", dist.Normal(solve(mean), 0.2), obs=y)

    return model


looped, called = orbit(anomaly), orbit(outside_jax)


def exact():
    """Mean, standard deviation and log evidence of the looped model, by quadrature over E."""
    e = np.linspace(-2.0, 5.0, 20_001)
    mean = e - 0.5 * np.sin(e)
    log_p = -0.5 * ((mean - 1.0) / 0.5) ** 2 - 0.5 * ((DATA - e) / 0.2) ** 2 - np.log(0.1 * 2 * np.pi)
    p = np.exp(log_p) * (1 - 0.5 * np.cos(e)) * (e[1] - e[0])
    centre = (p * mean).sum() / p.sum()
    return centre, np.sqrt((p * (mean - centre) ** 2).sum() / p.sum()), np.log(p.sum())


def mcmc_of(kernel, **options):
    defaults = {"num_warmup": 200, "num_samples": 1000, "num_chains": 4, "chain_method": "vectorized"}
    return MCMC(kernel, **(defaults | options), progress_bar=False)


# --- forward mode, and none --------------------------------------------------------------------------------------


def test_modes_agree():
    """With each other, and with the derivative of the solution, 1 / (1 - cos(E) / 2)."""
    z = jnp.array([0.3, 1.2, 2.0])
    smooth = lambda z: jnp.sin(z).sum() * z[0]  # noqa: E731
    for one, two in zip(differentiate(smooth, z, False)(z), differentiate(smooth, z, True)(z), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    root = lambda z: jax.vmap(anomaly)(z).sum()  # noqa: E731
    assert [derivatives(f, z) for f in (smooth, root, lambda z: jax.vmap(outside_jax)(z).sum())] == [
        Differentiation.REVERSE, Differentiation.FORWARD, Differentiation.NONE,
    ]  # fmt: skip
    value, gradient = differentiate(root, z)(z)
    e = jax.vmap(anomaly)(z)
    np.testing.assert_allclose(value, e.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 1 / (1 - 0.5 * jnp.cos(e)), rtol=1e-4)


def test_an_error_of_the_density_itself_is_no_answer():
    with pytest.raises(TypeError, match="incompatible shapes"):
        derivatives(lambda z: (z + jnp.ones(2)).sum(), jnp.zeros(3))


def test_moves_without_a_gradient_are_exact():
    """Random-walk Metropolis: exact draws stay exact."""
    problem = from_numpyro(called)
    y = {"y": jnp.array(DATA, jnp.float32)}
    centre, sd, _ = exact()
    start = centre + sd * random.normal(random.key(0), (2000, 1))
    target = jax.tree_util.Partial(problem.log_joint, y=y)
    z, _, moves = move_all(random.key(1), target, start, jnp.full((1, 1), sd), 20)
    assert 0.3 < moves.accept_prob < 0.8
    assert abs(z.mean() - centre) < 5 * sd / np.sqrt(2000)
    assert abs(z.std() / sd - 1) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("kind", LANGEVIN)
def test_langevin_kernels_find_forward_mode(kind):
    centre, sd, _ = exact()
    mcmc = mcmc_of(kind(looped), num_samples=5000)  # the small steps of ULA explore slowly
    mcmc.run(random.key(0), DATA)
    draws = np.asarray(mcmc.get_samples()["mean"])
    assert abs(draws.mean() - centre) < 0.25 * sd
    assert abs(draws.std() / sd - 1) < 0.15


def test_langevin_kernels_do_as_they_are_told():
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        mcmc_of(si.mcmc.MALA(looped, forward_mode_differentiation=False)).run(random.key(0), DATA)
    with pytest.raises(ValueError, match="neither reverse nor forward mode"):
        mcmc_of(si.mcmc.MALA(called)).run(random.key(0), DATA)
    draws = []
    for forward in (False, True):
        kernel = si.mcmc.MALA(potential_fn=lambda x: 0.5 * (x**2).sum(), forward_mode_differentiation=forward)
        mcmc = mcmc_of(kernel, num_samples=20)
        mcmc.run(random.key(0), init_params=jnp.ones((4, 2)))
        draws.append(mcmc.get_samples())
    np.testing.assert_allclose(*draws, atol=1e-3)


@pytest.mark.parametrize("model", [pytest.param(looped, marks=pytest.mark.slow), called], ids=["loop", "call"])
def test_explorer_finds_the_evidence(model):
    centre, sd, log_evidence = exact()
    y = {"y": jnp.array(DATA, jnp.float32)}
    evidence = learn(random.key(0), Target(from_numpyro(model), y), Effort(512, 5, 20), progress_bar=False).evidence
    assert abs(evidence.log_evidence - log_evidence) < 0.3
    assert abs(np.asarray(evidence.places).mean() - centre) < 5 * sd / np.sqrt(512) * 2


class Prior(GaussianProposal):
    """Proposals from about the prior, so that local moves have work to do."""

    def context(self, target):
        return self.shift


@pytest.mark.parametrize("model", [looped, called], ids=["loop", "call"])
def test_local_moves(model):
    centre, sd, _ = exact()
    kernel = ScoreSDE(posterior=Prior(jnp.ones(1), jnp.full(1, 0.5), from_numpyro(model)), num_local_steps=2)
    mcmc = mcmc_of(kernel)
    mcmc.run(random.key(0), DATA)
    draws = np.asarray(mcmc.get_samples()["mean"])
    assert abs(draws.mean() - centre) < 0.15 * sd
    assert abs(draws.std() / sd - 1) < 0.15
    assert mcmc.last_state.adapt_state.accept_prob.mean() > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("model", [looped, called], ids=["loop", "call"])
def test_fit_finds_what_it_can_use(model):
    centre, sd, log_evidence = exact()
    problem = from_numpyro(model)
    assert has_gradient(problem) == (model is looped)
    posterior = si.NPSE(model, num_steps=100, width=16, depth=1, progress_bar=False).fit(random.key(0))
    draws = posterior.sample(random.key(1), 4000, DATA)
    assert draws.certificate.certified, draws.certificate
    weight = np.exp(np.asarray(draws.log_weight - jax.nn.logsumexp(draws.log_weight), np.float64))
    assert effective_sample_size(draws.log_weight) > 1000
    assert abs(weight @ np.asarray(draws.sites["mean"]) - centre) < 0.1 * sd
    assert abs(draws.certificate.log_evidence - log_evidence) < 5 * draws.certificate.log_evidence_se
    if model is called:
        with pytest.raises(ValueError, match="`target_score=True` needs the gradient"):
            si.NPSE(model, num_steps=10, target_score=True, progress_bar=False).fit(random.key(0))


# --- gradients and densities that are no numbers -----------------------------------------------------------------

EXPOSURE, COUNTS = np.array([0.0, 8.0, 15.0, 4.0]), np.array([0, 3, 9, 1])


def counts(y=None):
    """A rate of zero where nothing is exposed: the density is right, its gradient NaN."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 4):
        numpyro.sample("y", dist.Poisson(EXPOSURE * jnp.exp(b)), obs=y)


@pytest.mark.parametrize("kind", LANGEVIN)
@pytest.mark.parametrize(
    ("num_chains", "method"), [(1, "vectorized"), (4, "vectorized"), (2, "sequential")], ids=["one", "many", "in turn"]
)
def test_start_without_a_gradient_is_refused(kind, num_chains, method):
    with pytest.raises(RuntimeError, match="gradient of the log density of y with respect to b is not finite"):
        mcmc_of(kind(counts), num_chains=num_chains, chain_method=method).run(random.key(0), COUNTS)


@pytest.mark.parametrize("num_chains", [1, 4])
def test_start_without_a_density_is_refused(num_chains):
    """By NumPyro's own check, which speaks of a parameter and names no site."""

    def logarithm(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.log(-1.0 - a**2), 1.0), obs=y)

    with pytest.raises(RuntimeError, match="log density of y is nan"):
        mcmc_of(si.mcmc.MALA(logarithm), num_chains=num_chains).run(random.key(0), 1.0)


@pytest.mark.parametrize("num_chains", [1, 4])
def test_start_where_told_is_looked_at_too(num_chains):
    def walled(x):
        return jnp.where(x > 0.0, x, jnp.nan).sum()

    start = jnp.ones((4, 1)).at[2].set(-1.0) if num_chains == 4 else -jnp.ones(1)
    with pytest.raises(RuntimeError, match=f"not finite where 1 of {num_chains} chains start"):
        mcmc_of(si.mcmc.MALA(potential_fn=walled), num_chains=num_chains).run(random.key(0), init_params=start)


def test_learned_sampler_refuses_what_has_no_gradient():
    with pytest.raises(FloatingPointError, match="gradient of the log density of y with respect to b is not finite"):
        learn(
            random.key(0),
            Target(from_numpyro(counts), {"y": jnp.asarray(COUNTS)}),
            Effort(256, 1, 20),
            progress_bar=False,
        )


def test_posterior_that_gives_no_number_is_refused():
    broken = Problem(**vars(location_scale_problem()) | {"log_likelihood": lambda z, y: jnp.nan * z.sum()})
    kernel = ScoreSDE(posterior=fake_posterior(broken))
    with pytest.raises(RuntimeError, match="not finite at any of 32 draws from the prior"):
        mcmc_of(kernel).run(random.key(0), np.ones(5, np.float32))
    kernel = ScoreSDE(posterior=fake_posterior(), bank_size=32)
    start = {"mu": jnp.full(4, jnp.nan), "sigma": jnp.zeros(4)}
    with pytest.raises(RuntimeError, match="by `init_params`"):
        mcmc_of(kernel).run(random.key(0), np.ones(5, np.float32) * np.arange(5), init_params=start)


def test_training_does_without_a_gradient_that_is_no_number():
    problem = from_numpyro(counts)
    drawn = simulate_joint(random.key(0), problem, 64, gradient=True)
    assert np.isnan(drawn.gradient).all()
    check_finite(drawn)
