"""Scalar integrals, expectation propagation and the square root against quadrature, Kalman and importance sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import bernoulli, norm, poisson, t as student

from scoreinfer._quadrature import tilt
from scoreinfer.filters.sites import Prior, marginals, propagate
from scoreinfer.filters.taper import everywhere, grid
from scoreinfer.filters.transform import transform
from scoreinfer.montecarlo.resampling import multinomial
from scoreinfer.score.sites import Sites

FAMILIES = {
    "arctan": lambda u: norm.logpdf(1.35, jnp.arctan(u), 0.05),
    "saturated": lambda u: norm.logpdf(1.7, jnp.arctan(u), 0.05),
    "counts": lambda u: poisson.logpmf(4, jnp.exp(u)),
    "bernoulli": lambda u: bernoulli.logpmf(1, jax.nn.sigmoid(u)),
    "student": lambda u: student.logpdf(3.0 - u, 3.0),
    "narrow": lambda u: norm.logpdf(2.013, u, 0.01),
}


@pytest.mark.parametrize("sd", [0.3, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_scalar_integrals_are_those_of_a_fine_grid(family, sd):
    with jax.enable_x64(True):
        likelihood, mean = FAMILIES[family], jnp.array([0.4])
        u = jnp.linspace(mean[0] - 12 * sd, mean[0] + 12 * sd, 200_001)
        weight = np.exp(likelihood(u) + norm.logpdf(u, mean[0], sd))
        centre = np.average(u, weights=weight)
        found = tilt(likelihood, mean, jnp.array([sd**2]))
        assert found.log_evidence[0] == pytest.approx(np.log(weight.sum() * (u[1] - u[0])), abs=2e-4)
        variance = np.average((u - centre) ** 2, weights=weight)
        assert found.mean[0] == pytest.approx(centre, abs=2e-3 * variance**0.5)
        assert found.variance[0] == pytest.approx(variance, rel=5e-3)


@pytest.mark.parametrize("double", [True, False])
def test_scalar_integrals_follow_the_mass_wherever_it_lies(double):
    """Prior N(0, 1), a normal likelihood: everything is known."""
    y, noise = np.array([7.0, 15.0, -400.0, 0.3, 0.0]), np.array([0.1, 0.1, 0.1, 1e-4, 30.0])
    total = 1.0 + noise**2
    with jax.enable_x64(double):
        likelihood = lambda u: norm.logpdf(jnp.asarray(y), u, jnp.asarray(noise))  # noqa: E731
        found = [np.asarray(part, float) for part in tilt(likelihood, jnp.zeros(5), jnp.ones(5))]
        rounding, near = 4 * float(jnp.finfo(jnp.zeros(()).dtype).eps), 1e-5 if double else 2e-2
    assert np.all(np.abs(found[1] - y / total) < 1e-5 * noise / total**0.5 + rounding * np.abs(y))
    np.testing.assert_allclose(found[2], noise**2 / total, rtol=near)
    np.testing.assert_allclose(found[0], -0.5 * (y**2 / total + np.log(2 * np.pi * total)), atol=near, rtol=rounding)


def test_scalar_integrals_have_derivatives():
    """d log Z / d m = (tilted mean - m) / v; where the likelihood is zero, the Gaussian stays."""

    def log_evidence(mean, y):
        return tilt(lambda u: norm.logpdf(y, u, 0.1), mean, jnp.full(1, 4.0)).log_evidence[0]

    slopes = jax.grad(log_evidence, argnums=(0, 1))(jnp.zeros(1), jnp.float32(3.0))
    np.testing.assert_allclose([slopes[0][0], slopes[1]], [3.0 / 4.01, -3.0 / 4.01], rtol=1e-4)
    nothing = tilt(lambda u: jnp.full_like(u, -jnp.inf), jnp.ones(1), jnp.full(1, 4.0))
    assert [float(value[0]) for value in nothing] == [-np.inf, 1.0, 4.0]


def two(covariance, mean):
    """A prior in two dimensions, as three members that have its moments."""
    root = np.linalg.cholesky(covariance)
    corners = np.array([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]]) * (4.0 / 3.0) ** 0.5
    return Prior(jnp.asarray(mean), jnp.asarray(corners @ root.T), jnp.zeros(2), everywhere(2))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "narrow"])
def test_marginals_in_the_plane_are_those_of_a_grid(family):
    """Two observed points, correlated .8. Expectation propagation is not exact: errors are in posterior sds."""
    with jax.enable_x64(True):
        mean, sd = np.array([0.3, 0.9]), 0.8
        covariance = sd**2 * np.array([[1.0, 0.8], [0.8, 1.0]])
        x = np.stack(np.meshgrid(*[np.linspace(m - 8 * sd, m + 8 * sd, 801) for m in mean], indexing="ij"), -1)
        log_prior = jax.scipy.stats.multivariate_normal.logpdf(
            jnp.asarray(x), jnp.asarray(mean), jnp.asarray(covariance)
        )
        log_density = np.asarray(log_prior + FAMILIES[family](jnp.asarray(x)).sum(-1))
        weight = np.exp(log_density - log_density.max())
        prior = two(covariance, mean)
        sites = propagate(prior, FAMILIES[family], jnp.ones(2, bool), num_sweeps=6)
        for i, (found, variance) in enumerate(zip(*marginals(prior, sites), strict=True)):
            centre = np.average(x[..., i], weights=weight)
            exact = np.average((x[..., i] - centre) ** 2, weights=weight)
            assert abs(found - centre) < 0.03 * exact**0.5
            assert variance / exact == pytest.approx(1.0, abs=0.06)


def gaussian(key, num=40, dim=6, locality=None):
    """A sample prior, and normal observations of all points but one."""
    members = jax.random.normal(key, (num, dim)) @ jax.random.normal(jax.random.fold_in(key, 1), (dim, dim))
    y, noise = jax.random.normal(jax.random.fold_in(key, 2), (dim,)), jnp.linspace(0.3, 2.0, dim)
    anomalies = members - members.mean(0)
    prior = Prior(members.mean(0), anomalies, jnp.linspace(0.0, 0.2, dim), locality or everywhere(dim))
    informed = jnp.arange(dim) != 2
    return prior, lambda u: jnp.where(informed, norm.logpdf(y, u, noise), 0.0), informed, y, noise


def kalman(prior, informed, y, noise):
    """The exact posterior."""
    anomalies, seen = np.asarray(prior.anomalies), np.flatnonzero(informed)
    covariance = anomalies.T @ anomalies / (len(anomalies) - 1) + np.diag(prior.added)
    gain = np.linalg.solve(covariance[np.ix_(seen, seen)] + np.diag(noise[seen] ** 2), covariance[seen]).T
    mean = prior.mean + gain @ (y[seen] - prior.mean[seen])
    return mean, covariance - gain @ covariance[seen]


def test_one_sweep_is_kalman():
    with jax.enable_x64(True):
        prior, likelihood, informed, y, noise = gaussian(jax.random.key(0))
        sites = propagate(prior, likelihood, informed, num_sweeps=1)
        np.testing.assert_allclose(sites.precision, jnp.where(informed, noise**-2.0, 0.0), rtol=1e-5)
        mean, covariance = kalman(prior, informed, y, noise)
        found = marginals(prior, sites)
        np.testing.assert_allclose(found[0], mean, atol=1e-5)
        np.testing.assert_allclose(found[1], np.diagonal(covariance), rtol=1e-5)


def test_moved_members_have_the_posterior_moments():
    with jax.enable_x64(True):
        prior, likelihood, informed, y, noise = gaussian(jax.random.key(1))
        prior = Prior(prior.mean, prior.anomalies, jnp.zeros(6), prior.locality)
        members = transform(prior, propagate(prior, likelihood, informed, num_sweeps=1), prior.anomalies)
        mean, covariance = kalman(prior, informed, y, noise)
        np.testing.assert_allclose(members.mean(0), mean, atol=1e-5)
        np.testing.assert_allclose(np.cov(members.T), covariance, atol=1e-5)


def test_blocks_do_not_see_beyond_their_border_and_nothing_informs_nothing():
    prior, likelihood, informed, _, _ = gaussian(jax.random.key(2), dim=12, locality=grid((12,), 2.0, half_width=9.0))
    far = propagate(prior, lambda u: likelihood(u).at[6].multiply(3.0), informed)
    near = propagate(prior, likelihood, informed)
    changed = np.abs(np.subtract(marginals(prior, far)[0], marginals(prior, near)[0])) > 1e-6
    assert changed[6] and not changed[[0, 1, 2, 10, 11]].any()
    nothing = propagate(prior, likelihood, jnp.zeros(12, bool))
    assert not any(np.asarray(part).any() for part in nothing)
    prior = Prior(prior.mean, prior.anomalies, jnp.zeros(12), prior.locality)
    np.testing.assert_allclose(transform(prior, nothing, prior.anomalies), prior.mean + prior.anomalies, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    prior, likelihood, informed, _, _ = gaussian(jax.random.key(3), dim=12, locality=grid((12,), 3.0))
    whole = propagate(prior, likelihood, informed)
    monkeypatch.setattr("scoreinfer.filters.sites.CHUNK", 5)
    np.testing.assert_allclose(propagate(prior, likelihood, informed), whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.3, 1.5])
def test_marginals_of_a_block_are_those_of_importance_sampling(sd):
    """17 correlated points seen through arctan: the distance from exact draws is that between sets of exact draws."""
    size, num = 17, 400
    distance = np.minimum(np.abs(np.subtract.outer(np.arange(size), np.arange(size))), 40)
    covariance = sd**2 * np.exp(-0.5 * (distance / 3.0) ** 2) + 1e-6 * np.eye(size)
    found, floor = [], []
    with jax.enable_x64(True):
        for case in range(8):
            key = jax.random.split(jax.random.key(case), 6)
            root = np.linalg.cholesky(covariance)
            mean = 3.0 * jax.random.normal(key[0], (size,))
            truth = mean + root @ jax.random.normal(key[1], (size,))
            y = jnp.arctan(truth) + 0.05 * jax.random.normal(key[2], (size,))
            members = jax.random.normal(key[3], (num, size))
            members = members - members.mean(0)
            whiten = np.linalg.inv(np.linalg.cholesky(np.cov(members.T)))
            prior = Prior(mean, members @ whiten.T @ root.T, jnp.zeros(size), everywhere(size))

            def likelihood(u, y=y):
                return norm.logpdf(y, jnp.arctan(u), 0.05)

            sites = propagate(prior, likelihood, jnp.ones(size, bool), num_sweeps=2)
            ours = np.asarray(transform(prior, sites, prior.anomalies))
            exact = np.asarray(importance(key[4], prior, covariance, sites, likelihood, 100_000, 2 * num))
            spread = exact.std(0)
            found.append(np.abs(np.sort(ours, 0) - np.sort(exact[:num], 0)).mean(0) / spread)
            floor.append(np.abs(np.sort(exact[num:], 0) - np.sort(exact[:num], 0)).mean(0) / spread)
    assert np.mean(found) < 1.3 * np.mean(floor)


def importance(key, prior, covariance, sites: Sites, likelihood, num, wanted):
    """Draw from the exact posterior by importance resampling from that of the sites."""
    precision = np.linalg.inv(covariance)
    given = np.linalg.inv(precision + np.diag(sites.precision))
    mean = given @ (precision @ prior.mean + sites.shift)
    noise = jax.random.normal(key, (num, len(mean)))
    x = mean + noise @ np.linalg.cholesky(given).T
    off = x - prior.mean
    log_weight = likelihood(x).sum(1) - 0.5 * jnp.sum(off @ precision * off, 1) + 0.5 * jnp.sum(noise**2, 1)
    return x[multinomial(jax.random.fold_in(key, 1), log_weight, wanted)]
