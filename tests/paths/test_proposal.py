"""Paths drawn backwards: exact against the Gaussian smoother, unbiased for scores that never saw any training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modes import heat, ornstein_uhlenbeck
from scoreinfer.model import from_numpyro
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.nets import ResidualMLP
from scoreinfer.paths import ReverseEuler, ThroughPhysics, draw_path, probability_flow
from scoreinfer.paths.proposal import END_STATE, PathProposal, pinned
from scoreinfer.samplers.base import Target
from scoreinfer.samplers.batches import weigh_rows, weighted_draws

CASES = {"ornstein_uhlenbeck": ornstein_uhlenbeck(), "heat": heat()}


def an_end(modes, seed=0):
    """A skewed end: two standard deviations off in some components."""
    sd = np.sqrt(modes.covariances()[:, -1, -1])
    return sd * np.linspace(-2.0, 1.5, len(sd))


def draw(proposal, target, num, seed=1):
    drawn = weighted_draws(jax.random.key(seed), proposal, target, 1024, None, 0, num)
    return np.asarray(drawn.z).reshape(num, -1, proposal.backward.process.dim), drawn


@pytest.mark.parametrize("name", CASES)
def test_exact_score_gives_the_smoother(name):
    """Noisy end: equal weights, the exact evidence, and all means and covariances, cross-time ones included."""
    modes = CASES[name]
    problem, end = from_numpyro(modes.model), an_end(modes)
    backward = ThroughPhysics(modes.process(), modes.score(), diagonal=name == "heat")
    proposal = PathProposal(backward, backward.process.num_steps, "y")
    paths, drawn = draw(proposal, Target(problem, {"y": jnp.asarray(end, jnp.float32)}), 4000)
    value, error = log_evidence(drawn.log_weight)
    assert effective_sample_size(drawn.log_weight) > 0.99 * 4000
    assert abs(value - modes.smoother(end)[2]) < 5 * error + 2e-3
    assert modes.disagreement(paths, drawn.log_weight, end) < 5.5


def test_known_end_is_an_observation_without_noise():
    modes = CASES["ornstein_uhlenbeck"]
    problem, end = pinned(from_numpyro(modes.path_model)), an_end(modes)
    backward = ThroughPhysics(modes.process(False), modes.score(False))
    proposal = PathProposal(backward, backward.process.num_steps, END_STATE)
    target = Target(problem, {END_STATE: jnp.asarray(end, jnp.float32)})
    paths, drawn = draw(proposal, target, 4000)
    assert np.array_equal(paths[:, -1], np.broadcast_to(target.y[END_STATE], (4000, 2)))
    value, _ = log_evidence(drawn.log_weight)
    assert effective_sample_size(drawn.log_weight) > 0.99 * 4000
    assert abs(value - modes.smoother(end, False)[2]) < 1e-3
    assert modes.disagreement(paths, drawn.log_weight, end, False) < 5.5
    again = weigh_rows(jax.random.key(0), proposal, target, jnp.arange(9), drawn.z[:9])
    np.testing.assert_allclose(again.log_q, drawn.log_q[:9], atol=2e-4)
    moved = drawn.z[:9].at[:, -1].add(0.1)
    assert np.all(weigh_rows(jax.random.key(0), proposal, target, jnp.arange(9), moved).log_q == -np.inf)


class RandomScore(eqx.Module):
    network: ResidualMLP

    def __call__(self, t, x):
        # About as steep as the exact score, which changes. Far off it, or in few steps, weights have no variance.
        return -jnp.array([1.2, 6.0]) * x + 0.3 * self.network(jnp.append(x, t).astype(jnp.float32))


@pytest.mark.parametrize("kernel", [ReverseEuler, pytest.param(ThroughPhysics, marks=pytest.mark.slow)])
def test_untrained_networks_give_unbiased_weights(kernel):
    """Any score gives exact weights: the evidence and the smoother are right, whatever the network."""
    modes = ornstein_uhlenbeck(12)
    network = ResidualMLP(jax.random.key(5), 3, 2, width=16, depth=1)
    weight = jax.random.normal(jax.random.key(6), network.last.weight.shape) / 4.0
    score = RandomScore(eqx.tree_at(lambda net: net.last.weight, network, weight))
    end = an_end(modes) / 2
    process = modes.process()
    proposal = PathProposal(kernel(process, score), process.num_steps, "y")
    target = Target(from_numpyro(modes.model), {"y": jnp.asarray(end, jnp.float32)})
    paths, drawn = draw(proposal, target, 20_000)
    value, error = log_evidence(drawn.log_weight)
    ess = effective_sample_size(drawn.log_weight)
    assert 100 < ess < 0.9 * 20_000, "the network should be neither useless nor right"
    assert abs(value - modes.smoother(end)[2]) < 5 * error < 0.5
    assert modes.disagreement(paths, drawn.log_weight, end) < 5.5
    again = weigh_rows(jax.random.key(0), proposal, target, jnp.arange(9), drawn.z[:9])
    np.testing.assert_allclose(again.log_q, drawn.log_q[:9], atol=2e-3)


@pytest.mark.parametrize("noise", [True, False], ids=["reverse SDE", "probability flow"])
def test_spectrum_of_what_runs_backwards(noise):
    """From ends of the process, both reverse walks have the marginals of the process at all times.

    The whole score with noise, half of it without: any other constant changes every mode's variance.
    """
    modes = heat(256, 8)._replace(g=0.4)
    process, score = modes.process(False), modes.score(False)
    variances = modes.covariances(False).diagonal(axis1=1, axis2=2).T
    num = 4000

    def one(key):
        for_end, for_path = jax.random.split(key)
        end = jnp.asarray(np.sqrt(variances[-1]), jnp.float32) * jax.random.normal(for_end, (8,))
        if noise:
            return draw_path(for_path, ReverseEuler(process, score), end)[0]
        return probability_flow(ReverseEuler(process, score), end)

    paths = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), num)), np.float64)
    ratio = (paths**2).mean(0) / variances
    discretisation = 0.03  # of 256 steps; a wrong factor moves the last modes by a factor of two and more
    assert np.abs(ratio - 1).max() < 5 * np.sqrt(2 / num) + discretisation
