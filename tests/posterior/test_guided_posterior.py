"""Learned priors: as sites of NumPyro, guided without training, saved and loaded."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

from compilations import Compilations
from laws import RANDOM
from scoreinfer.bijections.affine import Affine
from scoreinfer.errors import UnreadableFile
from scoreinfer.model.score_prior import ScorePrior, score_prior
from scoreinfer.montecarlo.weights import log_evidence, relative_weights
from scoreinfer.posterior.guided import DISCRETISED, FLOW, MODEL, Guided
from scoreinfer.posterior.score_files import load_score, save_score
from scoreinfer.posterior.score_fit import fit_score
from scoreinfer.process import VE, Noising
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.learned_prior import LearnedPrior
from scoreinfer.score import GaussianScore

CHANGE = Affine(jnp.array([0.5, -0.2]), jnp.array([[1.3, 0.0], [0.4, 0.8]]))
PRIOR = LearnedPrior(CHANGE, RANDOM, (2,), ProbabilityFlow(Noising(VE(level_min=0.3, level_max=3.0)), 3))
"""The flow of a score that nobody has trained."""


def counts(y=None):
    x = score_prior("x", PRIOR)
    numpyro.sample("y", dist.Poisson(jnp.exp(0.7 * x)).to_event(1), obs=y)


Y = jnp.array([3, 1])


def moments(x, log_weight):
    """Compute weighted means of x and x^2, and their standard errors."""
    w = relative_weights(log_weight)
    w, values = w / w.sum(), np.concatenate([x, x**2], axis=1)
    mean = w @ values
    return mean, np.sqrt((w**2) @ (values - mean) ** 2)


@pytest.mark.slow
def test_nuts_importance_weights_and_particles_agree():
    """All are exact for the flow of a prior that nobody has trained."""
    x = PRIOR.sample(jax.random.key(0), 40_000)
    log_likelihood = dist.Poisson(jnp.exp(0.7 * x)).to_event(1).log_prob(Y)
    expected, error = moments(np.asarray(x), log_likelihood)
    value, value_error = log_evidence(log_likelihood)
    for num_particles in (1, 4):
        posterior = Guided(counts, "x", PRIOR, num_steps=12, num_particles=num_particles).condition(y=Y)
        draws = posterior.sample(jax.random.key(1), 4000)
        assert posterior.exact_for == FLOW
        own, own_error = moments(np.asarray(draws.sites["x"]), draws.log_weight)
        assert (np.abs(own - expected) < 3 * np.hypot(error, own_error)).all()
        found = draws.certificate
        assert abs(found.log_evidence - value) < 3 * np.hypot(value_error, found.log_evidence_se)
    options = {"num_warmup": 300, "num_samples": 500, "num_chains": 2, "chain_method": "vectorized"}
    mcmc = MCMC(NUTS(counts), **options, progress_bar=False)
    mcmc.run(jax.random.key(2), y=Y)
    chains = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    chains = np.concatenate([chains, chains**2], axis=-1)
    error = np.hypot(error, chains.std((0, 1)) / np.sqrt(effective_sample_size(chains)))
    assert (np.abs(chains.mean((0, 1)) - expected) < 3 * error).all()


def test_density_of_the_site_is_that_of_the_flow():
    noise = jax.random.normal(jax.random.key(3), (4, 2))
    x = jax.vmap(PRIOR.forward)(noise)
    log_noise = dist.Normal(0.0, 1.0).log_prob(noise).sum(1)
    log_det = jax.vmap(lambda n: jnp.linalg.slogdet(jax.jacfwd(PRIOR.forward)(n))[1])(noise)
    np.testing.assert_allclose(ScorePrior(PRIOR).log_prob(x), log_noise - log_det, atol=1e-3)
    np.testing.assert_allclose(jax.vmap(PRIOR.inverse)(x)[0], noise, atol=2e-3)

    def direct():
        numpyro.sample("x", ScorePrior(PRIOR))

    np.testing.assert_allclose(log_density(direct, (), {}, {"x": x[0]})[0], (log_noise - log_det)[0], atol=1e-3)


# --- what the weights are exact for -----------------------------------------------------------------------------------


def normal(y=None, scale=0.4):
    x = numpyro.sample("x", dist.Normal(0.5, 1.2).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x[0] - 0.5 * x[1], scale), obs=y)


def test_the_models_own_density_corrects_a_score_of_another_prior():
    wrong = GaussianScore(jnp.zeros(2), 1.5 * jnp.eye(2))
    posterior = Guided(normal, "x", wrong, num_steps=24).condition(y=1.7)
    draws = posterior.sample(jax.random.key(4), 4000)
    assert posterior.exact_for == MODEL
    sd = np.sqrt(1.25 * 1.44 + 0.16)
    found = draws.certificate
    assert abs(found.log_evidence - dist.Normal(0.25, sd).log_prob(1.7)) < 5 * found.log_evidence_se
    own, error = moments(np.asarray(draws.sites["x"]), draws.log_weight)
    gain = 1.44 * np.array([1.0, -0.5]) / sd**2
    mean = 0.5 + gain * (1.7 - 0.25)
    variance = 1.44 - gain**2 * sd**2
    assert (np.abs(own - np.concatenate([mean, mean**2 + variance])) < 5 * error).all()


def spikes(y=None):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Poisson(jnp.exp(0.7 * x)).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "first", "second", "discretised"),
    [(normal, 1.7, -0.4, False), (normal, 1.7, -0.4, True), (spikes, Y, jnp.array([0, 2]), False)],
)
def test_other_data_need_no_compilation(model, first, second, discretised):
    """The second posterior is that of its own data."""
    guided = Guided(model, "x", GaussianScore(jnp.zeros(2), jnp.eye(2)), num_steps=3, discretised=discretised)

    def draw(y):
        return guided.condition(y=y).sample(jax.random.key(6), 64)

    before = draw(first)
    with Compilations() as compilations:
        draws = draw(second)
    assert compilations.count == 0
    own = jax.vmap(lambda z: draws.problem.log_joint(z, {}))(draws.unconstrained)
    np.testing.assert_allclose(own, draws.log_joint, rtol=1e-5)
    assert not np.isin(draws.unconstrained, before.unconstrained).all()


def test_the_product_with_a_gaussian_is_in_closed_form():
    """Sohl-Dickstein's r(x): a Gaussian prior times a Gaussian r, whose tempered use (EnSF's rule) is biased."""

    def product():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.factor("r", -0.5 * ((x - 1.0) ** 2 / 0.25).sum())

    posterior = Guided(product, "x", GaussianScore(jnp.zeros(2), jnp.eye(2)), num_steps=32).condition()
    draws = posterior.sample(jax.random.key(5), 4000)
    own, error = moments(np.asarray(draws.sites["x"]), draws.log_weight)
    assert (np.abs(own[:2] - 0.8) < 5 * error[:2]).all()
    assert (np.abs(own[2:] - (0.64 + 0.2)) < 5 * error[2:]).all()
    assert draws.certificate.ess > 3900
    assert abs(draws.certificate.log_evidence - 2 * (np.log(0.2**0.5) - 0.4)) < 0.01
    assert abs(_tempered_variance() / 0.2 - 1) > 0.2


def _tempered_variance(num_steps=20_000):
    """Compute the variance that the reverse ODE ends with, where the score of r gets the weight 1 - t (EnSF's rule).

    With x_t = (1 - t) x_0 + sqrt(t) e and the prior N(0, 1), x_t has the variance p = (1 - t)^2 + t; the flow is
    dx/dt = a x - g^2 score / 2, a = -1 / (1 - t), g^2 = 1 + 2 t / (1 - t), score -x / p - (1 - t) (x - 1) / .25.
    """
    spread, times = 1.0, np.linspace(1 - 1e-3, 0.0, num_steps + 1)
    for t, after in itertools.pairwise(times):
        push = 1 + 2 * t / (1 - t)
        slope = -1 / (1 - t) + 0.5 * push * (1 / ((1 - t) ** 2 + t) + (1 - t) / 0.25)
        spread *= np.exp((after - t) * slope)
    return spread**2


def test_large_states_and_wishes_take_the_discretised_prior():
    posterior = Guided(normal, "x", GaussianScore(jnp.full(2, 0.5), 1.44 * jnp.eye(2)), discretised=True, num_steps=24)
    draws = posterior.condition(y=1.7).sample(jax.random.key(6), 2000)
    assert posterior.condition(y=1.7).exact_for == DISCRETISED
    assert abs(draws.certificate.log_evidence - dist.Normal(0.25, 1.25 * 1.44 + 0.16).log_prob(1.7)) < 1.0
    assert draws.sites["x"].shape == (2000, 2)


# --- learning, saving, bad input --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    draws = jax.random.normal(jax.random.key(7), (2000, 2)) @ jnp.array([[1.0, 0.8], [0.0, 0.3]]) + 3.0
    return fit_score(jax.random.key(8), draws, num_steps=500, width=16, depth=1, progress_bar=False)


def test_a_learned_prior_has_the_density_of_its_draws(learned):
    x = jax.random.normal(jax.random.key(9), (500, 2)) @ jnp.array([[1.0, 0.8], [0.0, 0.3]]) + 3.0
    entropy = 1 + np.log(2 * np.pi) + np.log(0.3)
    mean = float(jax.jit(jax.vmap(learned.log_density))(x).mean())
    assert abs(mean + entropy) < 0.1 + 5 / 500**0.5


def test_a_prior_is_learned_from_a_model():
    def model():
        numpyro.sample("rate", dist.Gamma(3.0, 1.0))

    prior = fit_score(jax.random.key(10), model, num_steps=250, width=8, depth=1, progress_bar=False)
    assert prior.shape == (1,)
    assert abs(float(jnp.exp(prior.sample(jax.random.key(11), 4000)).mean()) - 3.0) < 0.3


def test_saved_priors_are_loaded(learned, tmp_path):
    save_score(learned, tmp_path / "prior")
    loaded = load_score(tmp_path / "prior")
    key = jax.random.key(12)
    np.testing.assert_array_equal(loaded.sample(key, 5), learned.sample(key, 5))
    assert loaded.training == learned.training
    weights = tmp_path / "prior" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UnreadableFile, match="checksum"):
        load_score(tmp_path / "prior")


def impossible(y=None):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.factor("r", jnp.where(x[0] > 50.0, x[1], -jnp.inf))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Guided(normal, "x", GaussianScore(jnp.zeros(3), jnp.eye(3))).condition(y=1.0), "another shape"),
        (lambda: Guided(impossible, "x", GaussianScore(jnp.zeros(2), jnp.eye(2)), num_steps=4).condition().sample(
            jax.random.key(0), 8), "zero at every one of 8 draws"),
        (lambda: fit_score(jax.random.key(0), jnp.zeros((50, 2))), "at least 100 draws"),
        (lambda: fit_score(jax.random.key(0), jnp.full((200, 2), jnp.nan)), "200 of 200 are not"),
        (lambda: save_score(PRIOR, "nowhere"), "Only scores learned by"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()
