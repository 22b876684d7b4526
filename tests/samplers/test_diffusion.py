"""Samplers: exact on oracles, and unbiased for networks that never saw any training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.nets import ConditionalMLP
from scoreinfer.process import VP, Noising
from scoreinfer.samplers.diffusion import ProbabilityFlow, ReverseSDE, log_normal
from scoreinfer.score import GaussianScore, MixtureScore, NeuralScore

COVARIANCE = jnp.array([[1.0, 0.6, 0.2], [0.6, 0.8, 0.1], [0.2, 0.1, 0.3]])
MEAN = jnp.array([0.5, -0.3, 0.2])
SAMPLERS = [ProbabilityFlow(num_steps=12), ReverseSDE(num_steps=64), ProbabilityFlow(Noising(VP()), 12)]


def gaussian_density(x):
    return jax.scipy.stats.multivariate_normal.logpdf(x, MEAN, COVARIANCE)


def skewed_density(x):
    """A normal pushed through sinh in its first component: neither symmetric nor centred."""
    inner = jnp.arcsinh(x[0] - 0.3) * 2.0 - 0.5
    jacobian = jnp.log(2.0) - 0.5 * jnp.log1p((x[0] - 0.3) ** 2)
    return log_normal(inner[None], 0.0, 1.0) + jacobian + log_normal(x[1:], 0.4 * x[0] ** 2, 0.5)


@eqx.filter_jit
def run(sampler, score, num, log_density, dim, seed=0):
    keys = jax.random.split(jax.random.key(seed), num)
    x, log_q = jax.vmap(lambda key: sampler.sample(key, score, dim))(keys)
    return x, log_q, jax.vmap(log_density)(x) - log_q


def random_network(dim=2, gain=0.5):
    network = ConditionalMLP(jax.random.key(5), dim, 0, 2 * dim, width=16, depth=2)
    weight = gain * jax.random.normal(jax.random.key(6), network.last.weight.shape) / 4.0
    network = eqx.tree_at(lambda net: net.last.weight, network, weight)
    return _NoContext(network)


class _NoContext(eqx.Module):
    network: ConditionalMLP

    def __call__(self, x, log_level, context):
        return self.network(x, log_level, jnp.zeros(0))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["flow", "sde", "flow-vp"])
def test_exact_score_gives_equal_weights(sampler):
    x, _, log_weight = run(sampler, GaussianScore(MEAN, COVARIANCE), 2000, gaussian_density, 3)
    ess = effective_sample_size(log_weight)
    value, error = log_evidence(log_weight)
    assert ess > 0.8 * 2000
    assert abs(value) < 5 * error + 1e-4
    w = np.exp(log_weight - log_weight.max())
    w /= w.sum()
    bound = 5 / np.sqrt(ess)
    assert np.all(np.abs(w @ x - MEAN) < bound * np.sqrt(np.diag(COVARIANCE)))
    centred = x - MEAN
    assert np.all(np.abs((centred * w[:, None]).T @ centred - COVARIANCE) < 2 * bound)


@pytest.mark.parametrize("sampler", [ProbabilityFlow(num_steps=8), ReverseSDE(num_steps=24)], ids=["flow", "sde"])
@pytest.mark.parametrize("density", [skewed_density, lambda x: log_normal(x, 0.5, 0.7)], ids=["skewed", "shifted"])
def test_untrained_networks_give_unbiased_weights(sampler, density):
    """Any score gives exact weights: the evidence of a normalised density is 0, whatever the network."""
    x, _, log_weight = run(sampler, NeuralScore(random_network()), 20_000, density, 2, seed=3)
    value, error = log_evidence(log_weight)
    ess = effective_sample_size(log_weight)
    assert 50 < ess < 19_000, "the network should be neither useless nor right"
    assert abs(value) < 5 * error
    if density is not skewed_density:
        w = np.exp(log_weight - log_weight.max())
        assert np.all(np.abs(w @ x / w.sum() - 0.5) < 5 * np.sqrt(0.7 / ess))


@pytest.mark.parametrize("score", ["mixture", "random"])
def test_flow_density_of_a_given_point_is_that_of_drawing_it(score):
    """Inverting the steps finds the density that drawing computed; an independent route to the same number."""
    if score == "random":
        score = NeuralScore(random_network())
    else:
        score = MixtureScore(jnp.array([0.3, 0.7]), jnp.array([[-1.0, 0.0], [1.0, 0.5]]), jnp.array([0.2, 0.3]))
    sampler = ProbabilityFlow(num_steps=12)
    x, log_q, _ = run(sampler, score, 200, lambda x: jnp.float32(0.0), 2)
    again = eqx.filter_jit(jax.vmap(lambda x: sampler.log_q(jax.random.key(0), score, x)))(x)
    assert np.mean(np.isfinite(again)) > 0.98
    finite = np.isfinite(again) & np.isfinite(log_q)
    assert np.allclose(again[finite], log_q[finite], atol=5e-3)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_fewer_steps_of_a_longer_flow_are_those_of_a_shorter_one(num_steps):
    score = NeuralScore(random_network())
    fewer = ProbabilityFlow(num_steps=8, inflation=0.1).with_steps(num_steps)
    shorter = ProbabilityFlow(num_steps=num_steps, inflation=0.1)
    assert fewer.num_evaluations == shorter.num_evaluations
    (x, log_q, _), (expected, log_expected, _) = (
        run(sampler, score, 100, lambda x: jnp.float32(0.0), 2) for sampler in (fewer, shorter)
    )
    assert np.allclose(x, expected, atol=1e-4) and np.allclose(log_q, log_expected, atol=1e-3)
    again = eqx.filter_jit(jax.vmap(lambda x: fewer.log_q(jax.random.key(0), score, x)))(x)
    assert np.median(np.abs(again - log_q)) < 5e-3


def test_a_flow_without_steps_is_gaussian():
    sampler = ProbabilityFlow(num_steps=0, inflation=0.15)
    x, log_q, _ = run(sampler, NeuralScore(random_network()), 4000, lambda x: jnp.float32(0.0), 2)
    variance = (1 + 0.15 / np.sqrt(2)) ** 2
    assert np.abs(np.cov(x.T) - variance * np.eye(2)).max() < 5 * variance * np.sqrt(2 / 4000)
    assert np.allclose(log_q, jax.vmap(lambda x: log_normal(x, 0.0, variance))(x), atol=1e-5)
    again = jax.vmap(lambda x: sampler.log_q(jax.random.key(0), None, x))(x)
    assert np.allclose(again, log_q, atol=1e-5)


def test_flow_density_integrates_to_one_on_a_grid():
    """The density of the flow, from the inverse map alone, sums to one: no Jacobian is missing or doubled."""
    score, sampler = NeuralScore(random_network()), ProbabilityFlow(num_steps=8)
    axis = jnp.linspace(-7.0, 7.0, 141)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_q = eqx.filter_jit(jax.vmap(lambda x: sampler.log_q(jax.random.key(0), score, x)))(grid)
    total = float(jnp.exp(log_q).sum() * (axis[1] - axis[0]) ** 2)
    assert abs(total - 1.0) < 0.01


def test_path_density_of_a_given_point_is_unbiased():
    """E over forward paths of q(path)/F(path) is the density of the draw: for an exact score, the target's."""
    spread = jnp.array([0.3, 1.0, 0.6])
    score, sampler = GaussianScore(MEAN, jnp.diag(spread)), ReverseSDE(num_steps=64)
    x = jnp.array([0.1, 0.2, 0.0])
    keys = jax.random.split(jax.random.key(2), 4000)
    log_q = eqx.filter_jit(jax.vmap(lambda key: sampler.log_q(key, score, x)))(keys)
    value, error = log_evidence(log_q)
    assert abs(value - log_normal(x, MEAN, spread)) < 5 * error + 2e-3


def test_folding_flow_gets_weight_zero_and_stays_unbiased():
    """A score so steep that Heun steps fold space: draws there are refused, not given a wrong weight."""

    class Steep(GaussianScore):
        def denoise(self, level, x, y=None):
            return x + 6.0 * level * jnp.sin(3.0 * x)

    _, log_q, _ = run(ProbabilityFlow(num_steps=4), Steep(jnp.zeros(1), jnp.eye(1)), 500, lambda x: jnp.float32(0.0), 1)
    assert bool(jnp.isposinf(log_q).any())


def test_trace_integral_trap_stays_away():
    """log Z of a sharp mixture is right at 16 steps; a trace-integral density would miss it by tenths."""
    weights, scales = jnp.array([0.5, 0.5]), jnp.array([0.05, 0.1])
    means = jnp.array([[-1.0, 0.3], [0.9, -0.4]])
    target = lambda x: jax.nn.logsumexp(  # noqa: E731
        jax.vmap(lambda m, s: log_normal(x, m, s**2))(means, scales), b=weights
    )
    _, _, log_weight = run(ProbabilityFlow(num_steps=16), MixtureScore(weights, means, scales), 20_000, target, 2)
    value, error = log_evidence(log_weight)
    assert error < 0.02
    assert abs(value) < 5 * error
