"""Twisted particles: exact for a linear Gaussian, unbiased for a network that nobody has trained."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import COARSE, RANDOM
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.process import VE, Noising
from scoreinfer.samplers.reverse import levels_of, start_kernel, step_kernel
from scoreinfer.samplers.twisted import TwistedNoise
from scoreinfer.score import (
    DensityLikelihood,
    GaussianLikelihood,
    GaussianScore,
    MomentMatched,
    SiteLikelihood,
    Steered,
)
from scoreinfer.score.guidance import moments_of

MEAN = jnp.array([0.5, -0.3, 0.2, 0.1])
COVARIANCE = 0.8 ** jnp.abs(jnp.arange(4)[:, None] - jnp.arange(4)) * jnp.array([1.0, 0.7, 0.5, 1.2])[:, None]
COVARIANCE = 0.5 * (COVARIANCE + COVARIANCE.T)
ROWS, SCALE = jnp.array([[1.0, -0.5, 0.2, 0.0], [0.3, 0.8, 0.0, 1.0]]), jnp.array([0.05, 0.5])
Y = jnp.array([0.8, -1.5])
SEEN = GaussianLikelihood(lambda x: ROWS @ x, Y, SCALE)


@eqx.filter_jit
def draw(sampler, num, seed=0):
    """Draw x_0 and weights."""

    def one(key):
        for_run, for_pick = jax.random.split(key)
        paths, last = sampler._run(for_run, None)
        return paths.x[jax.random.categorical(for_pick, last.log_weight), -1], last.log_evidence

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), num))


@pytest.mark.always
def test_linear_gaussians_are_drawn_without_weights():
    """Any rows, any noise: moments, effective size and evidence of a Gaussian posterior, no correction needed."""
    noisy = ROWS @ COVARIANCE @ ROWS.T + jnp.diag(SCALE**2)
    gain = COVARIANCE @ ROWS.T @ jnp.linalg.inv(noisy)
    mean, covariance = MEAN + gain @ (Y - ROWS @ MEAN), COVARIANCE - gain @ ROWS @ COVARIANCE
    expected = jax.scipy.stats.multivariate_normal.logpdf(Y, ROWS @ MEAN, noisy)
    guidance, num = MomentMatched(GaussianScore(MEAN, COVARIANCE), SEEN), 8000
    x, log_weight = draw(TwistedNoise(guidance, Noising(VE()), 4, 48, 1), num)
    assert effective_sample_size(log_weight) > 0.99 * num
    assert abs(log_evidence(log_weight)[0] - expected) < 5e-3
    unit = jnp.linalg.solve(jnp.linalg.cholesky(covariance), (x - mean).T).T
    assert np.abs(unit.mean(0)).max() < 5 / num**0.5
    assert np.abs(unit.T @ unit / num - jnp.eye(4)).max() < 5 * (2 / num) ** 0.5


def discretised_prior(score, process, num_steps):
    """Compute weighted points of the discretised prior in the plane: a grid at every level but zero, then nodes."""
    axis = np.linspace(-9, 9, 109)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), jnp.float32)
    levels, cell = levels_of(process, num_steps), float(axis[1] - axis[0]) ** 2
    density = jnp.exp(jax.vmap(start_kernel(moments_of(score, levels[0], jnp.zeros(2)), levels[0]).log_density)(grid))

    def kernel(x, level, target):
        return step_kernel(moments_of(score, level, x), x, level, target)

    @jax.jit
    def step(density, level, target):
        def add(total, inputs):
            x, mass = inputs
            return total + mass * jnp.exp(jax.vmap(kernel(x, level, target).log_density)(grid)), None

        return jax.lax.scan(add, jnp.zeros_like(density), (grid, density * cell))[0]

    for level, target in itertools.pairwise(levels[:-1]):
        density = step(density, level, target)
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    noise = jnp.asarray(np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2), jnp.float32)
    share = np.outer(weights, weights).ravel() / (2 * np.pi)
    last = jax.jit(jax.vmap(lambda x: jax.vmap(kernel(x, levels[-2], levels[-1]).point)(noise)))
    probability = np.outer(np.asarray(density, np.float64) * cell, share)
    return last(grid).reshape(-1, 2), probability.ravel()


SEEN_BY = {
    "gaussian": (MomentMatched, GaussianLikelihood(lambda x: x[:1] - 0.5 * x[1:], jnp.array([0.9]), jnp.array([0.4]))),
    "counts": (MomentMatched, SiteLikelihood(lambda x: x, lambda u: 2 * u - jnp.exp(u))),
    "density": (MomentMatched, DensityLikelihood(lambda x: x, lambda x: -((x[0] * x[1] - 0.5) ** 2))),
    "steered": (
        partial(Steered, gamma=1.0),
        GaussianLikelihood(lambda x: x[:1] - 0.5 * x[1:], jnp.array([0.9]), jnp.array([0.4])),
    ),
}


@pytest.fixture(scope="module")
def prior():
    return discretised_prior(RANDOM, COARSE, 3)


@pytest.mark.parametrize(
    ("name", "num_particles"), [("gaussian", 1), ("gaussian", 8), ("counts", 8), ("density", 1), ("steered", 1)]
)
def test_evidence_and_means_of_an_untrained_network_are_those_of_quadrature(prior, name, num_particles):
    points, probability = prior
    assert abs(probability.sum() - 1) < 2e-3
    guide, seen = SEEN_BY[name]
    joint = probability * np.exp(np.asarray(jax.jit(jax.vmap(seen.log_density))(points), np.float64))
    expected, mean = np.log(joint.sum()), joint @ np.asarray(points) / joint.sum()
    x, log_weight = draw(TwistedNoise(guide(RANDOM, seen), COARSE, 2, 3, num_particles), 10_000 // num_particles)
    value, error = log_evidence(log_weight)
    assert 1e-3 < error < 0.1, "weights should be neither useless nor equal"
    assert abs(value - expected) < 5 * error + 2e-3
    centred = np.exp(np.asarray(log_weight, np.float64) - value)[:, None] * (np.asarray(x) - mean)
    assert (np.abs(centred.mean(0)) < 5 * centred.std(0) / len(x) ** 0.5 + 5e-3).all()
