"""Critically damped Langevin: exact weights for any score, the splitting's accuracy, and the loss's minimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import disturbed, standard_errors
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.process import CriticallyDamped
from scoreinfer.samplers.diffusion import log_normal
from scoreinfer.samplers.splitting import SymmetricSplitting
from scoreinfer.score.velocity import GaussianVelocity
from scoreinfer.training.hybrid import hybrid_loss, velocity_score

MEAN, SD = 1.5, 0.3


@pytest.mark.parametrize(("num_steps", "least", "most"), [(5, 0.1, 1.0), (10, 0.245, 0.3), (20, 0.265, 0.3)])
def test_splitting_nears_a_narrow_gaussian(num_steps, least, most):
    """N(1.5, .3^2), exact score: the standard deviation rises to .3. Euler-Maruyama has 1.56 and .58 at 10 and 20."""
    damped = CriticallyDamped()
    exact = GaussianVelocity(damped, jnp.array([MEAN]), jnp.array([SD**2]))
    sampler, num = SymmetricSplitting(damped, num_steps), 20_000
    x, _ = jax.jit(jax.vmap(lambda key: sampler.sample(key, exact, 1)))(jax.random.split(jax.random.key(0), num))
    bound = 5 * SD / (2 * num) ** 0.5
    assert least - bound < x.std() < most + bound


def log_target(x):
    """A normal, moved and narrowed, and bent in its second component."""
    return log_normal(x[:1], 0.2, 0.9) + log_normal(x[1:], 0.2 * x[0] ** 2 - 0.1, 0.9)


@pytest.fixture(scope="module")
def untrained():
    """A sampler of few steps with the score of a network that nobody has trained; the rate grows with time."""
    damped = CriticallyDamped(beta=1.5, growth=2.0, start_share=1.0)
    score = velocity_score(jax.random.key(1), 2, damped, width=8, depth=1)
    return SymmetricSplitting(damped, 4, 1.0), disturbed(score, 2, 0.02)


def test_weights_of_an_untrained_network_are_exact(untrained):
    sampler, score = untrained
    num = 20_000
    x, log_q = jax.jit(jax.vmap(lambda key: sampler.sample(key, score, 2)))(jax.random.split(jax.random.key(3), num))
    log_weight = jax.vmap(log_target)(x) - log_q
    value, error = log_evidence(log_weight)
    ess = effective_sample_size(log_weight)
    assert 100 < ess < 0.9 * num, "the network should be neither useless nor right"
    assert abs(value) < 5 * error
    tilted = np.exp(np.asarray(log_weight, np.float64))[:, None] * (np.asarray(x) - np.array([0.2, 0.2 * 0.94 - 0.1]))
    assert standard_errors(tilted) < 5


def test_given_points_are_weighed_over_forward_paths(untrained):
    """Bounded functions of the weight have the same mean over draws, tilted, as over exact points (see `laws`)."""
    sampler, score = untrained
    num, bounded = 20_000, lambda log_weight: 1 / (1 + np.exp(np.asarray(log_weight, np.float64)))
    keys = jax.random.split(jax.random.key(4), num)
    x, log_q = jax.jit(jax.vmap(lambda key: sampler.sample(key, score, 2)))(keys)
    drawn = np.asarray(jax.vmap(log_target)(x) - log_q, np.float64)
    noise = np.random.default_rng(0).standard_normal((num, 2))
    first = 0.2 + 0.9**0.5 * noise[:, 0]
    exact = jnp.asarray(np.stack([first, 0.2 * first**2 - 0.1 + 0.9**0.5 * noise[:, 1]], 1), jnp.float32)
    log_given = jax.jit(jax.vmap(lambda key, x: sampler.log_q(key, score, x)))(keys, exact)
    given = np.asarray(jax.vmap(log_target)(exact) - log_given, np.float64)
    assert standard_errors((np.exp(drawn) * bounded(drawn))[:, None], bounded(given)[:, None]) < 5


def test_the_loss_is_least_at_the_exact_score():
    """For N(0, I) the network's output is zero: what is left of the noise depends on neither state nor time."""
    damped = CriticallyDamped()
    score = velocity_score(jax.random.key(5), 1, damped, width=8, depth=1)  # untrained: its output is zero
    x, grown = jax.random.normal(jax.random.key(6), (4000, 1)), disturbed(score, 7, 0.1)
    exact, other = (float(hybrid_loss(each, x, jax.random.key(8))) for each in (score, grown))
    assert exact < other
    keys = jax.random.split(jax.random.key(9), 64)
    x = jax.random.normal(jax.random.key(10), (64, 256, 1))
    gradient = jax.jit(jax.vmap(lambda x, key: jax.grad(lambda s: hybrid_loss(score.__class__(damped, s), x, key))(
        score.network).last.bias))(x, keys)  # fmt: skip
    assert standard_errors(np.asarray(gradient)) < 5


def test_the_random_first_velocity_tames_the_target():
    """The variance of the regression target at small times is 1 / L_22^2: larger where the velocity is given."""
    t = jnp.array(1e-3)
    hybrid, given = (CriticallyDamped(start_share=share).marginal(t).factor[1, 1] for share in (0.04, 0.0))
    assert 1 / hybrid**2 < 0.9 / given**2
