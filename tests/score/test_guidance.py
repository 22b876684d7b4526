"""Guidance and likelihoods: exact where they say so, and finite for scores that nobody has trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy import stats

from scoreinfer._quadrature import tilt
from scoreinfer.score import (
    AbstractScore,
    GaussianLikelihood,
    GaussianScore,
    MomentMatched,
    Moments,
    Published,
    SiteLikelihood,
    Steered,
)

LEVEL = jnp.float32(0.7)


# --- likelihoods against quadrature ----------------------------------------------------------------------------------

SITES = {
    "normal": lambda u: stats.norm.logpdf(1.3, u, 0.3),
    "counts": lambda u: stats.poisson.logpmf(3, jnp.exp(u)),
    "binary": lambda u: jax.nn.log_sigmoid(-2.0 * u),
    "heavy tails": lambda u: stats.t.logpdf(2.0, 3.0, u, 0.4),
    "narrow and bent": lambda u: stats.norm.logpdf(jnp.arctan(u), 0.9, 0.05),
}
FAR = {"heavy tails": 0.06, "narrow and bent": 0.02}
"""How far sites that are not log-concave may be off, in posterior standard deviations, where they depend on each other.
Measured: .033 and .008."""


def quadrature(log_density, num=1201, half=9.0):
    """Compute log mass, mean and covariance of a density in the plane, on a grid."""
    axis = np.linspace(-half, half, num)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2))
    log_p = np.asarray(jax.vmap(log_density)(grid), np.float64)
    p = np.exp(log_p - log_p.max())
    log_mass = log_p.max() + np.log(p.sum()) + 2 * np.log(axis[1] - axis[0])
    p /= p.sum()
    mean = p @ np.asarray(grid)
    centred = np.asarray(grid) - mean
    return log_mass, mean, (centred * p[:, None]).T @ centred


@pytest.mark.parametrize("name", SITES)
def test_tilted_moments_are_those_of_quadrature(name):
    mean, variance = jnp.array([0.4]), jnp.array([1.7])
    found = tilt(SITES[name], mean, variance)
    u = np.linspace(-20, 20, 400_001)
    p = np.asarray(jnp.exp(stats.norm.logpdf(u, 0.4, 1.7**0.5) + SITES[name](jnp.asarray(u))), np.float64)
    mass = p.sum() * (u[1] - u[0])
    centre = (p @ u) / p.sum()
    width = np.sqrt(p @ (u - centre) ** 2 / p.sum())
    np.testing.assert_allclose(found.log_evidence, np.log(mass), atol=5e-3)
    assert abs(found.mean[0] - centre) < 1e-2 * width
    assert abs(found.variance[0] ** 0.5 / width - 1) < 1e-2


@pytest.mark.parametrize("name", SITES)
def test_expectation_propagation_is_near_the_posterior(name):
    mean, covariance = jnp.array([0.3, -0.2]), jnp.array([[1.0, 0.6], [0.6, 0.8]])
    seen = SiteLikelihood(lambda x: x, SITES[name])
    joint = lambda u: stats.multivariate_normal.logpdf(u, mean, covariance) + SITES[name](u).sum()  # noqa: E731
    log_mass, centre, spread = quadrature(joint)
    prior = Moments(mean, jnp.linalg.cholesky(covariance))
    given, log_evidence = seen.pull(*prior).condition(prior, jnp.eye(2))
    sd, far = np.sqrt(np.diag(spread)), FAR.get(name, 0.01)
    assert np.abs(given.mean - centre).max() < far * sd.max()
    assert np.abs(np.sqrt(given.variance) / sd - 1).max() < 2 * far
    assert abs(log_evidence - log_mass) < 2 * far


@pytest.mark.parametrize("scale", [0.1, 3e-3])
def test_precise_sites_pull_as_their_gaussians_do_in_single_precision(scale):
    y, mean, covariance = (jnp.asarray(v, jnp.float32) for v in ([0.9, -1.1], [0.3, -0.2], [[1.0, 0.6], [0.6, 0.8]]))
    prior = Moments(mean, jnp.linalg.cholesky(covariance))
    sites = SiteLikelihood(lambda x: x, lambda u: stats.norm.logpdf(y, u, scale))
    exact = GaussianLikelihood(lambda x: x, y, jnp.full(2, scale, jnp.float32))
    found, expected = (seen.pull(*prior).condition(prior, jnp.eye(2, dtype=jnp.float32)) for seen in (sites, exact))
    assert np.abs(found[0].mean - expected[0].mean).max() < 0.02 * scale
    np.testing.assert_allclose(found[0].variance, expected[0].variance, rtol=1e-2)
    assert abs(found[1] - expected[1]) < 0.05


# --- large states ----------------------------------------------------------------------------------------------------


class Chain(AbstractScore):
    """The score of a stationary chain with neighbours correlated by 0.8; variances without a matrix."""

    covariance: jax.Array

    def denoise(self, level, x, y=None):
        return self.covariance @ jnp.linalg.solve(self.covariance + level**2 * jnp.eye(x.size), x)

    def moments(self, level, x, y=None):
        gain = jnp.linalg.solve(self.covariance + level**2 * jnp.eye(x.size), self.covariance)
        return gain.T @ x, level**2 * gain.diagonal()


def chain(dim):
    index = jnp.arange(dim)
    return 0.8 ** jnp.abs(index[:, None] - index[None]).astype(jnp.float32)


@pytest.mark.parametrize(("every", "num_solves"), [(4, 5), (1, 60)], ids=["rows", "solved"])
def test_large_states_have_the_posterior_mean(every, num_solves):
    dim = 96
    covariance, x = chain(dim), jnp.sin(jnp.arange(dim) / 5.0)
    y = jnp.cos(jnp.arange(0, dim, every) / 7.0)
    seen = GaussianLikelihood(lambda x: x[::every], y, jnp.full(y.size, 0.3))
    guided = MomentMatched(Chain(covariance), seen, num_solves)
    given = covariance - covariance @ jnp.linalg.solve(covariance + LEVEL**2 * jnp.eye(dim), covariance)
    denoised = Chain(covariance).denoise(LEVEL, x)
    gain = jnp.linalg.solve(given[::every, ::every] + 0.09 * jnp.eye(y.size), given[::every]).T
    moments = guided.gaussian(LEVEL, x)
    np.testing.assert_allclose(moments.mean, denoised + gain @ (y - denoised[::every]), atol=1e-3)
    if every > 1:
        np.testing.assert_allclose(moments.covariance, (given - gain @ given[::every]).diagonal(), rtol=1e-3)
        sites = SiteLikelihood(seen.predict, lambda u: stats.norm.logpdf(y, u, 0.3))
        same = MomentMatched(Chain(covariance), sites).guide(LEVEL, x)
        np.testing.assert_allclose(same.posterior.mean, moments.mean, atol=1e-2)
        np.testing.assert_allclose(same.log_twist, guided.guide(LEVEL, x).log_twist, atol=0.1)


class Twisted(AbstractScore):
    """A denoiser whose Jacobian is neither symmetric nor positive, as a learned one's may be."""

    def denoise(self, level, x, y=None):
        return -2.0 * jnp.roll(x, 1) - x

    def moments(self, level, x, y=None):
        return self.denoise(level, x), jnp.ones_like(x)


@pytest.mark.parametrize("dim", [8, 96])
def test_bad_jacobians_leave_guidance_bounded(dim):
    """The symmetric part is negative: what the observation pulls must stay of the size of the residual."""
    y = jnp.ones(dim)
    guided = MomentMatched(Twisted(), GaussianLikelihood(lambda x: x, y, jnp.full(dim, 1e-2)))
    moments = guided.gaussian(jnp.float32(10.0), jnp.zeros(dim))
    assert np.abs(moments.mean).max() < 1e3 * np.abs(y).max()
    assert np.isfinite(moments.factor).all()


def test_many_predictors_need_a_gaussian_likelihood():
    guided = MomentMatched(Chain(chain(96)), SiteLikelihood(lambda x: x, lambda u: -u))
    with pytest.raises(ValueError, match="GaussianLikelihood"):
        guided.denoise(LEVEL, jnp.zeros(96))


# --- published guidance ----------------------------------------------------------------------------------------------


def test_published_forms_are_gradients_of_their_twists():
    rows, y = jnp.array([[1.0, -0.5]]), jnp.array([1.5])
    prior = GaussianScore(jnp.zeros(2), jnp.array([[1.0, 0.6], [0.6, 0.8]]))
    seen = GaussianLikelihood(lambda x: rows @ x, y, jnp.array([0.1]))
    x, denoised = jnp.array([0.4, -0.7]), prior.denoise(LEVEL, jnp.array([0.4, -0.7]))
    pull = prior.jacobian(LEVEL, x).T @ rows.T @ (y - rows @ denoised)
    steered = denoised + LEVEL**2 * pull / (0.01 + 0.05 * LEVEL**2)
    published = denoised + LEVEL**2 * 2 * 0.3 * pull / jnp.abs(y - rows @ denoised)
    np.testing.assert_allclose(Steered(prior, seen, 0.05).denoise(LEVEL, x), steered, rtol=1e-4)
    np.testing.assert_allclose(Published(prior, seen, 0.3).denoise(LEVEL, x), published, rtol=1e-4)
