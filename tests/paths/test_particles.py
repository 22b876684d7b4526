"""Paths resampled on their way: exact against the smoother with bad kernels, and given a path a Gibbs step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import MCMC

import scoreinfer as si
from modes import ornstein_uhlenbeck
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.paths.particles import ResampledPaths
from scoreinfer.samplers.batches import draw_rows, weigh_rows

MODES = ornstein_uhlenbeck()
END = np.array([-1.0, 0.5], np.float32)
NUM = 2000


@pytest.fixture(scope="module")
def posterior():
    """Kernels far too broad: weights of single paths are poor."""
    learned = si.SMDP(MODES.model, "x", num_steps=0).fit(jax.random.key(0))
    factor = learned.backward.frame.factor
    where = lambda tree: (tree.paths.backward.frame.factor, tree.known_end.backward.frame.factor)  # noqa: E731
    return eqx.tree_at(where, learned, (1.6 * factor, 1.6 * factor))


def test_resampled_paths_are_the_smoother(posterior):
    draws = posterior.resampled(16).sample(jax.random.key(1), NUM, y=END)
    plain = draw_rows(jax.random.key(1), posterior.paths, posterior.condition(y=END).target, jnp.arange(NUM))
    found = draws.certificate
    assert effective_sample_size(plain.log_weight) < 0.05 * NUM
    assert found.ess > 0.4 * NUM, found
    assert abs(found.log_evidence - MODES.smoother(END)[2]) < 5 * found.log_evidence_se
    assert MODES.disagreement(draws.sites["x"], draws.log_weight, END) < 5.5


def test_conditional_runs_are_the_rest_of_a_run(posterior):
    """Around paths of the posterior 1 / Z averages to one over the evidence, as it must for a Gibbs step."""
    mean, covariance, evidence = MODES.smoother(END)
    noise = np.random.default_rng(0).standard_normal((NUM, 2, 9))
    paths = mean + np.einsum("its,nis->nti", np.linalg.cholesky(covariance), noise)
    proposal = ResampledPaths(posterior.paths, 16)
    values = jnp.asarray(paths.reshape(NUM, -1), jnp.float32)
    weighed = weigh_rows(jax.random.key(2), proposal, posterior.condition(y=END).target, jnp.arange(NUM), values)
    inverse, error = log_evidence(-np.asarray(weighed.log_weight))
    assert error < 0.1
    assert abs(inverse + evidence) < 5 * error


def test_corrector_narrows_what_was_drawn_too_broadly(posterior):
    """Langevin steps with the score and the transition: the smoother's means and variances, but for the first state."""
    mean, covariance, _ = MODES.smoother(END, False)
    variance = covariance.diagonal(axis1=1, axis2=2).T[1:]
    ends = np.broadcast_to(END, (NUM, 2))
    plain, corrected = (np.asarray(posterior.reverse_sde(jax.random.key(3), ends, num))[:, 1:-1] for num in (0, 15))
    ratio = ((corrected - mean[1:]) ** 2).mean(0) / variance
    assert (((plain - mean[1:]) ** 2).mean(0) / variance).min() > 2
    assert np.abs(np.log(ratio)).max() < 0.1 + 5 * (2 / NUM) ** 0.5  # a step of finite length adds about 5 %
    assert np.abs((corrected.mean(0) - mean[1:]) / variance**0.5).max() < 5 / NUM**0.5


@pytest.mark.slow
def test_poor_weights_are_resampled_and_said_so(posterior):
    where = lambda tree: tree.known_end.backward.frame.factor  # noqa: E731
    posterior = eqx.tree_at(where, posterior, 1.15 * where(posterior))
    draws = posterior.condition_on_end(END).sample(jax.random.key(1), NUM)
    assert draws.info.num_particles == 32 and draws.certificate.ess > 0.3 * NUM
    error = 5 * draws.certificate.log_evidence_se
    assert abs(draws.certificate.log_evidence - MODES.smoother(END, False)[2]) < error
    assert MODES.disagreement(draws.sites["x"], draws.log_weight, END, False) < 5.5
    assert posterior.resampled(1).condition_on_end(END).sample(jax.random.key(1), NUM).info.num_particles == 1


@pytest.mark.slow
def test_chains_of_resampled_paths(posterior):
    """Particle independent Metropolis, alternating with local moves that conditional runs weigh."""
    kernel = si.ScoreSDE(posterior=posterior.resampled(16), num_local_steps=1)
    mcmc = MCMC(kernel, num_warmup=50, num_samples=500, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(2), y=END, extra_fields=("accept_prob",))
    accepted = float(mcmc.get_extra_fields()["accept_prob"].mean())
    assert accepted > 0.4
    wasted = (2 / accepted - 1) ** 0.5
    assert MODES.disagreement(mcmc.get_samples()["x"], np.zeros(2000), END) < 5.5 * wasted
