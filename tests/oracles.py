"""Problems with known answers: ordinary NumPyro models beside their closed-form (or fine-grid) posteriors.

Every oracle knows, for *any* observation, the posterior mean and covariance, the log evidence, exact posterior draws,
and the probability of named regions (modes). All truths are computed in float64 by NumPy.

    oracle = linear_gaussian(dim=2)
    draws = posterior.sample(key, 4000, **oracle.data)
    truth = oracle.truth(oracle.data)
    assert disagreement(truth, oracle.flat(draws.sites), draws.log_weight) < 5
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed, trace, uncondition
from scipy import stats
from scipy.special import betaln, gammaln, logsumexp

Data = dict[str, np.ndarray]


class Region(NamedTuple):
    """A region of parameter space and its posterior probability (a mode, a tail)."""

    contains: Callable[[np.ndarray], np.ndarray]
    probability: float


class Truth(NamedTuple):
    """The answer for one observation; parameters are flat vectors of constrained values, sites side by side.

    Args:
        mean: posterior mean.
        covariance: posterior covariance.
        log_evidence: log p(y).
        sample: exact posterior draws, ``sample(rng, num) -> (num, dim)``.
        regions: regions whose probability is known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    log_evidence: float
    sample: Callable[[np.random.Generator, int], np.ndarray]
    regions: tuple[Region, ...] = ()


class Oracle(NamedTuple):
    """A NumPyro model ``model(**data)`` and its answers.

    Args:
        name: name in test ids and tables.
        model: the model; every keyword is an observed site and defaults to None.
        latents: names of the latent sites, in the order in which ``flat`` puts them.
        data: one observation of some interest.
        truth: the answer for any observation.
    """

    name: str
    model: Callable
    latents: tuple[str, ...]
    data: Data
    truth: Callable[[Data], Truth]

    def flat(self, sites: dict) -> np.ndarray:
        """Put the latent sites of draws side by side: ``(num, dim)`` in float64."""
        columns = [np.asarray(sites[name], np.float64) for name in self.latents]
        return np.concatenate([c.reshape(c.shape[0], -1) for c in columns], axis=1)

    def simulate(self, key) -> tuple[np.ndarray, Data]:
        """Draw parameters from the prior and an observation from the model."""
        sites = trace(seed(uncondition(self.model), key)).get_trace(**self.data)
        values = {name: site["value"] for name, site in sites.items() if site["type"] == "sample"}
        theta = np.concatenate([np.ravel(np.asarray(values[name], np.float64)) for name in self.latents])
        return theta, {name: np.asarray(values[name]) for name in self.data}


def disagreement(truth: Truth, theta: np.ndarray, log_weight=None, ess: float | None = None) -> float:
    """Compute the largest distance, in standard errors, of weighted draws from the truth.

    Compared are all means, all second central moments and all regions. The standard error of each is its *exact*
    posterior sd over the square root of the effective sample size, so that draws which miss a mode, and therefore
    look precise, are found out.

    Args:
        truth: the answer.
        theta: draws, ``(num, dim)``.
        log_weight: log importance weights; None for equal ones.
        ess: effective sample size, where it is known better than from the weights (chains).

    Returns:
        The largest absolute z-score; below 5 unless something is wrong.
    """
    log_weight = np.zeros(len(theta)) if log_weight is None else np.asarray(log_weight, np.float64)
    weight = np.exp(log_weight - logsumexp(log_weight))
    ess = 1.0 / np.sum(weight**2) if ess is None else ess
    exact = statistics(truth, truth.sample(np.random.default_rng(0), 20_000))
    error = weight @ statistics(truth, theta) - expectations(truth)
    # A statistic that is almost surely constant has no sd to speak of: allow it one draw in the exact sample.
    sd = np.maximum(exact.std(axis=0), 1.0 / np.sqrt(len(exact)) * (exact.std(axis=0) == 0))
    return float(np.max(np.abs(error) / (sd / np.sqrt(ess))))


def statistics(truth: Truth, theta: np.ndarray) -> np.ndarray:
    """Evaluate parameters, their centred products and the regions' indicators: ``(num, statistics)``."""
    centred = theta - truth.mean
    rows, columns = np.triu_indices(theta.shape[1])
    products = centred[:, rows] * centred[:, columns]
    inside = [np.asarray(region.contains(theta), np.float64)[:, None] for region in truth.regions]
    return np.concatenate([theta, products, *inside], axis=1)


def expectations(truth: Truth) -> np.ndarray:
    """Compute the exact expectations of `statistics`."""
    probabilities = [region.probability for region in truth.regions]
    return np.concatenate([truth.mean, truth.covariance[np.triu_indices(len(truth.mean))], probabilities])


# --- Gaussian and mixture: closed form


def linear_gaussian(dim: int = 2, noise: float = 0.5) -> Oracle:
    """theta ~ N(0, I), y ~ N(A theta, noise^2 I) with a fixed matrix A that couples neighbours."""
    matrix = np.eye(dim) + 0.5 * np.eye(dim, k=1) - 0.3 * np.eye(dim, k=-1)
    device_matrix = jnp.asarray(matrix)

    def model(y=None):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        numpyro.sample("y", dist.Normal(device_matrix @ theta, noise).to_event(1), obs=y)

    def truth(data):
        y = np.asarray(data["y"], np.float64)
        covariance = np.linalg.inv(np.eye(dim) + matrix.T @ matrix / noise**2)
        mean = covariance @ matrix.T @ y / noise**2
        evidence = stats.multivariate_normal(np.zeros(dim), matrix @ matrix.T + noise**2 * np.eye(dim)).logpdf(y)
        factor = np.linalg.cholesky(covariance)
        return Truth(mean, covariance, evidence, lambda rng, num: mean + rng.standard_normal((num, dim)) @ factor.T)

    y = np.random.default_rng(dim).standard_normal(dim).astype(np.float32) * 1.2
    return Oracle(f"linear_gaussian_{dim}", model, ("theta",), {"y": y}, truth)


def gaussian_mixture(noise: float = 0.6) -> Oracle:
    """Two well-separated prior modes and one linear observation that moves weight between them."""
    weights = np.array([0.65, 0.35])
    locs = np.array([[-2.5, 0.0], [2.5, 0.5]])
    scales = np.array([[0.5, 0.8], [0.4, 0.5]])
    direction = np.array([0.15, 1.0])

    def model(y=None):
        components = dist.Normal(jnp.asarray(locs), jnp.asarray(scales)).to_event(1)
        prior = dist.MixtureSameFamily(dist.Categorical(probs=jnp.asarray(weights)), components)
        theta = numpyro.sample("theta", prior)
        numpyro.sample("y", dist.Normal(theta @ jnp.asarray(direction), noise), obs=y)

    def truth(data):
        y = float(data["y"])
        spread = np.sqrt((scales**2) @ direction**2 + noise**2)
        log_parts = np.log(weights) + stats.norm(locs @ direction, spread).logpdf(y)
        evidence = logsumexp(log_parts)
        share = np.exp(log_parts - evidence)
        gain = scales**2 * direction / spread[:, None] ** 2
        means = locs + gain * (y - locs @ direction)[:, None]
        covariances = np.einsum("ki,ij->kij", scales**2, np.eye(2)) - _outer(gain * spread[:, None])
        mean = share @ means
        covariance = np.einsum("k,kij->ij", share, covariances + _outer(means - mean))
        right = float(share @ stats.norm(means[:, 0], np.sqrt(covariances[:, 0, 0])).sf(0.0))
        factors = np.linalg.cholesky(covariances)

        def sample(rng, num):
            which = rng.choice(2, size=num, p=share)
            return means[which] + np.einsum("nij,nj->ni", factors[which], rng.standard_normal((num, 2)))

        return Truth(mean, covariance, evidence, sample, (Region(lambda theta: theta[:, 0] > 0.0, right),))

    return Oracle("gaussian_mixture", model, ("theta",), {"y": np.float32(0.4)}, truth)


def _outer(rows: np.ndarray) -> np.ndarray:
    return rows[:, :, None] * rows[:, None, :]


# --- Skewed, counts, binaries: conjugate


def skewed(num: int = 8) -> Oracle:
    """A variance with an inverse-gamma posterior: one-dimensional, positive, skewed to the right."""
    shape, rate = 3.0, 2.0

    def model(y=None):
        variance = numpyro.sample("variance", dist.InverseGamma(shape, rate))
        with numpyro.plate("rows", num):
            numpyro.sample("y", dist.Normal(0.0, jnp.sqrt(variance)), obs=y)

    def truth(data):
        y = np.asarray(data["y"], np.float64)
        a, b = shape + num / 2, rate + np.sum(y**2) / 2
        evidence = shape * np.log(rate) - a * np.log(b) + gammaln(a) - gammaln(shape) - num / 2 * np.log(2 * np.pi)
        return _one_dimensional(stats.invgamma(a, scale=b), evidence)

    y = np.array([0.3, -1.2, 0.8, 2.1, -0.4, 0.1, -1.7, 0.6], np.float32)[:num]
    return Oracle("skewed", model, ("variance",), {"y": y}, truth)


def counts(num: int = 6) -> Oracle:
    """A Poisson rate with a gamma posterior."""
    shape, rate = 2.0, 0.5

    def model(y=None):
        intensity = numpyro.sample("intensity", dist.Gamma(shape, rate))
        with numpyro.plate("rows", num):
            numpyro.sample("y", dist.Poisson(intensity), obs=y)

    def truth(data):
        y = np.asarray(data["y"], np.float64)
        a, b = shape + y.sum(), rate + num
        evidence = shape * np.log(rate) - a * np.log(b) + gammaln(a) - gammaln(shape) - gammaln(y + 1).sum()
        return _one_dimensional(stats.gamma(a, scale=1 / b), evidence)

    return Oracle("counts", model, ("intensity",), {"y": np.array([3, 1, 4, 2, 0, 5], np.int32)[:num]}, truth)


def binaries(num: int = 10) -> Oracle:
    """A Bernoulli probability with a beta posterior."""
    a, b = 2.0, 3.0

    def model(y=None):
        probability = numpyro.sample("probability", dist.Beta(a, b))
        with numpyro.plate("rows", num):
            numpyro.sample("y", dist.Bernoulli(probability), obs=y)

    def truth(data):
        ones = float(np.sum(data["y"]))
        evidence = betaln(a + ones, b + num - ones) - betaln(a, b)
        return _one_dimensional(stats.beta(a + ones, b + num - ones), evidence)

    y = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 1], np.int32)[:num]
    return Oracle("binaries", model, ("probability",), {"y": y}, truth)


def _one_dimensional(posterior, evidence: float) -> Truth:
    upper = float(posterior.ppf(0.9))
    return Truth(
        np.array([posterior.mean()]),
        np.array([[posterior.var()]]),
        float(evidence),
        lambda rng, num: posterior.rvs(size=(num, 1), random_state=rng),
        (Region(lambda theta: theta[:, 0] > upper, 0.1),),
    )


# --- Banana and hierarchy: fine grids


def banana(noise: float = 0.5) -> Oracle:
    """A curved, skewed two-dimensional target: theta1 ~ N(0, 1), theta2 ~ N(theta1^2, 0.5^2), y ~ N(sum, noise^2)."""

    def model(y=None):
        first = numpyro.sample("first", dist.Normal(0.0, 1.0))
        second = numpyro.sample("second", dist.Normal(first**2, 0.5))
        numpyro.sample("y", dist.Normal(first + second, noise), obs=y)

    def truth(data):
        def log_joint(first, second):
            prior = stats.norm.logpdf(first) + stats.norm(first**2, 0.5).logpdf(second)
            return prior + stats.norm(first + second, noise).logpdf(float(data["y"]))

        grid = _Grid(log_joint, np.linspace(-7.0, 7.0, 1401), np.linspace(-5.0, 25.0, 1501))
        mean, covariance = grid.moments()
        right = Region(lambda theta: theta[:, 0] > 0.0, grid.expect(lambda first, _: (first > 0) + 0.5 * (first == 0)))
        return Truth(mean, covariance, grid.log_evidence, grid.sample, (right,))

    return Oracle("banana", model, ("first", "second"), {"y": np.float32(1.0)}, truth)


def hierarchical(noise: float = 0.8) -> Oracle:
    """Four group effects about an unknown mean with an unknown spread (a shallow funnel)."""
    num_groups = 4

    def model(y=None):
        centre = numpyro.sample("centre", dist.Normal(0.0, 1.5))
        spread = numpyro.sample("spread", dist.LogNormal(-0.5, 0.7))
        with numpyro.plate("groups", num_groups):
            effect = numpyro.sample("effect", dist.Normal(centre, spread))
            numpyro.sample("y", dist.Normal(effect, noise), obs=y)

    def truth(data):
        y = np.asarray(data["y"], np.float64)

        def log_joint(centre, log_spread):  # effects integrated out; spread in logs
            total = np.sqrt(np.exp(2 * log_spread) + noise**2)
            prior = stats.norm.logpdf(centre, 0.0, 1.5) + stats.norm.logpdf(log_spread, -0.5, 0.7)
            return prior + sum(stats.norm.logpdf(value, centre, total) for value in y)

        grid = _Grid(log_joint, np.linspace(-9.0, 9.0, 901), np.linspace(-5.0, 4.5, 951))

        def effects(centre, log_spread):
            """Compute mean and variance of each effect given centre and spread."""
            precision = np.exp(-2 * log_spread) + noise**-2
            prior_part = centre * np.exp(-2 * log_spread)
            return [(prior_part + value / noise**2) / precision for value in y], 1.0 / precision

        def conditional_means(centre, log_spread):
            return [centre, np.exp(log_spread), *effects(centre, log_spread)[0]]

        mean, covariance = grid.moments(conditional_means)
        within = grid.expect(lambda centre, log_spread: effects(centre, log_spread)[1])
        covariance[2:, 2:] += within * np.eye(num_groups)

        def sample(rng, num):
            centre, log_spread = grid.sample(rng, num).T
            means, variance = effects(centre, log_spread)
            noisy = [m + np.sqrt(variance) * rng.standard_normal(num) for m in means]
            return np.stack([centre, np.exp(log_spread), *noisy], axis=1)

        wide = Region(lambda theta: theta[:, 1] > 1.0, grid.expect(lambda _, s: (s > 0) + 0.5 * (s == 0)))
        return Truth(mean, covariance, grid.log_evidence, sample, (wide,))

    y = np.array([0.9, -0.4, 1.6, 0.2], np.float32)
    return Oracle("hierarchical", model, ("centre", "spread", "effect"), {"y": y}, truth)


class _Grid:
    """A two-dimensional density on a fine grid: evidence, moments, draws (uniform within the cell)."""

    def __init__(self, log_joint: Callable, first: np.ndarray, second: np.ndarray):
        self.axes = np.meshgrid(first, second, indexing="ij")
        self.steps = (first[1] - first[0], second[1] - second[0])
        log_mass = log_joint(*self.axes) + np.log(np.prod(self.steps))
        self.log_evidence = float(logsumexp(log_mass))
        self.mass = np.exp(log_mass - self.log_evidence)

    def expect(self, function: Callable) -> float:
        """Compute the expectation of ``function(first, second)``."""
        return float(np.sum(self.mass * function(*self.axes)))

    def moments(self, functions: Callable = lambda *axes: axes) -> tuple[np.ndarray, np.ndarray]:
        """Compute mean and covariance of several functions of the axes."""
        values = np.stack([np.ravel(v) for v in functions(*self.axes)])
        mean = values @ self.mass.ravel()
        centred = values - mean[:, None]
        return mean, (centred * self.mass.ravel()) @ centred.T

    def sample(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Draw cells by their mass, and a point within each."""
        cell = rng.choice(self.mass.size, size=num, p=self.mass.ravel() / self.mass.sum())
        points = np.stack([axis.ravel()[cell] for axis in self.axes], axis=1)
        return points + (rng.random((num, 2)) - 0.5) * self.steps


def oracles() -> tuple[Oracle, ...]:
    """Make one of each, the linear-Gaussian in two and ten dimensions."""
    return (
        linear_gaussian(2), linear_gaussian(10), gaussian_mixture(), skewed(), banana(), counts(), binaries(),
        hierarchical(),
    )  # fmt: skip


def prior_draws(oracle: Oracle, key, num: int) -> tuple[np.ndarray, list[Data]]:
    """Draw ``num`` parameters and observations (a loop: for tens, not thousands)."""
    pairs = [oracle.simulate(k) for k in jax.random.split(key, num)]
    return np.stack([theta for theta, _ in pairs]), [data for _, data in pairs]


# --- bare densities with many modes: minus log density, and everything known about it ---------------------------------


class Density(NamedTuple):
    """A bare density and its answers.

    Args:
        name: name in tables.
        potential: minus the log density of one point.
        dim: number of dimensions.
        start_scale: a standard deviation around zero that covers it.
        log_evidence: log of its integral.
        sample: exact draws, ``sample(rng, num) -> (num, dim)``.
        mode_of: the number of the mode that each of many points belongs to.
        modes: probability of each mode.
    """

    name: str
    potential: Callable
    dim: int
    start_scale: float
    log_evidence: float
    sample: Callable[[np.random.Generator, int], np.ndarray]
    mode_of: Callable[[np.ndarray], np.ndarray]
    modes: np.ndarray


def gaussian_mixture_density(name: str, means: np.ndarray, variance: float, start_scale: float) -> Density:
    """Make an equal mixture of Gaussians of one variance."""
    centres, dim = jnp.asarray(means, jnp.float32), means.shape[1]
    constant = np.log(len(means)) + 0.5 * dim * np.log(2 * np.pi * variance)

    def potential(x):
        return constant - jax.scipy.special.logsumexp(-0.5 * ((x - centres) ** 2).sum(1) / variance)

    def sample(rng, num):
        return means[rng.integers(len(means), size=num)] + np.sqrt(variance) * rng.normal(size=(num, dim))

    def mode_of(x):
        return np.argmin(((x[:, None] - means) ** 2).sum(-1), axis=1)

    return Density(name, potential, dim, start_scale, 0.0, sample, mode_of, np.full(len(means), 1 / len(means)))


def many_well(dim: int = 5) -> Density:
    """Make a product of double wells (x^2 - 4)^2, two to the ``dim`` modes; answers by quadrature of one well."""
    grid = np.linspace(-4.0, 4.0, 200_001)
    cumulative = np.cumsum(np.exp(-((grid**2 - 4) ** 2))) * (grid[1] - grid[0])

    def sample(rng, num):
        return np.interp(rng.uniform(size=(num, dim)) * cumulative[-1], cumulative, grid)

    return Density(
        f"many_well_{dim}", lambda x: ((x**2 - 4) ** 2).sum(), dim, 5.0, dim * float(np.log(cumulative[-1])), sample,
        lambda x: (x > 0) @ (1 << np.arange(dim)), np.full(1 << dim, 0.5**dim),
    )  # fmt: skip


def funnel(dim: int = 10) -> Density:
    """Make Neal's funnel: v ~ N(0, 9), the others N(0, exp v); the "modes" are neck and mouth, v < 0 and v > 0."""

    def potential(x):
        constant = 0.5 * np.log(2 * np.pi * 9) + 0.5 * (dim - 1) * np.log(2 * np.pi)
        return x[0] ** 2 / 18 + 0.5 * (dim - 1) * x[0] + 0.5 * jnp.exp(-x[0]) * (x[1:] ** 2).sum() + constant

    def sample(rng, num):
        v = 3 * rng.normal(size=(num, 1))
        return np.concatenate([v, np.exp(v / 2) * rng.normal(size=(num, dim - 1))], axis=1)

    return Density(
        f"funnel_{dim}", potential, dim, 5.0, 0.0, sample, lambda x: (x[:, 0] > 0).astype(int), np.full(2, 0.5)
    )


def densities() -> list[Density]:
    """Make all of them."""
    grid = np.stack(np.meshgrid([-5.0, 0.0, 5.0], [-5.0, 0.0, 5.0]), axis=-1).reshape(9, 2)
    forty = [np.random.default_rng(0).uniform(-40, 40, size=(40, dim)) for dim in (2, 10)]
    return [
        gaussian_mixture_density("mixture_9", grid, 0.3, 5.0),
        *(gaussian_mixture_density(f"mixture_40_in_{m.shape[1]}", m, 1.0, 40.0) for m in forty),
        many_well(),
        funnel(),
    ]
