"""Learned priors and guidance against known answers: figures of `accuracy.py --suite priors`."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import multivariate_normal

from scoreinfer.evidence.certificate import certify_weights
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence, relative_weights
from scoreinfer.process import VE, CriticallyDamped, Noising
from scoreinfer.samplers.splitting import SymmetricSplitting
from scoreinfer.samplers.twisted import TwistedNoise
from scoreinfer.score import GaussianLikelihood, GaussianScore, MixtureScore, MomentMatched, Published, Steered
from scoreinfer.score.velocity import GaussianVelocity


class Rows(eqx.Module):
    """The linear map x -> A x; problems with the same shapes share one program."""

    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


@eqx.filter_jit
def draw(sampler, keys):
    """Draw x_0 and log weights."""

    def one(key):
        for_run, for_pick = jax.random.split(key)
        paths, last = sampler._run(for_run, None)
        return paths.x[jax.random.categorical(for_pick, last.log_weight), -1], last.log_evidence

    return jax.lax.map(one, keys, batch_size=512)


def drawn(sampler, seed: int, num: int):
    x, log_weight = draw(sampler, jax.random.split(jax.random.key(seed), num))
    return np.asarray(x, np.float64), np.asarray(log_weight, np.float64)


# --- linear Gaussian


def linear_gaussian(seed: int, dim: int = 8, num_rows: int = 3, num: int = 50_000, num_steps: int = 64):
    """Any rows and noises: unweighted moments, effective share and evidence, beside the published forms."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim)) / dim**0.5
    covariance, mean = root @ root.T + 0.1 * np.eye(dim), rng.normal(size=dim) / 2
    rows, scale = rng.normal(size=(num_rows, dim)), np.array([0.05, 0.3, 1.0])[:num_rows]
    y = rows @ (mean + root @ rng.normal(size=dim)) + scale * rng.normal(size=num_rows)
    noisy = rows @ covariance @ rows.T + np.diag(scale**2)
    gain = covariance @ rows.T @ np.linalg.inv(noisy)
    truth = mean + gain @ (y - rows @ mean), covariance - gain @ rows @ covariance
    expected = float(multivariate_normal.logpdf(y, rows @ mean, noisy))
    prior = GaussianScore(jnp.asarray(mean, jnp.float32), jnp.asarray(covariance, jnp.float32))
    seen = GaussianLikelihood(*_float32(Rows(jnp.asarray(rows)), y, scale))

    def figures(guide, num):
        x, log_weight = drawn(TwistedNoise(guide(prior, seen), Noising(VE()), dim, num_steps, 1), seed, num)
        found = x[np.isfinite(x).all(1) & (np.abs(x) < 1e6).all(1)]
        if len(found) < num / 2:  # diverged
            return x, log_weight, np.inf, np.full(dim, np.nan)
        return x, log_weight, _wasserstein(found, *truth), np.sqrt(np.diag(np.cov(found.T)) / np.diag(truth[1]))

    _, log_weight, distance, ratio = figures(MomentMatched, num)
    _, _, sda, sda_ratio = figures(partial(Steered, gamma=1e-2), num // 10)  # diverges where its W2 is infinite
    return {
        "w2": distance, "sd_ratio_least": ratio.min(), "sd_ratio_most": ratio.max(),
        "ess_share": effective_sample_size(log_weight) / num,
        "log_evidence_error": abs(log_evidence(log_weight)[0] - expected),
        "sda_w2": sda, "sda_sd_ratio_least": sda_ratio.min(),
    }  # fmt: skip


def _float32(*values):
    return tuple(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), value) for value in values)


def _root(matrix):
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _wasserstein(x, mean, covariance):
    """Compute W2 / sqrt(dim) between a Gaussian and the Gaussian with the moments of draws."""
    own, root = np.cov(x.T), _root(covariance)
    cross = _root(root @ own @ root)
    square = ((x.mean(0) - mean) ** 2).sum() + np.trace(own + covariance - 2 * cross)
    return np.sqrt(max(square, 0.0) / len(mean))


# --- the mixture of 25 components (Cardoso et al. 2023, arXiv 2308.07983, section 5)


class Mixture(NamedTuple):
    """A mixture prior, one observation of it, and the exact posterior, again a mixture."""

    score: MixtureScore
    seen: GaussianLikelihood
    shares: np.ndarray
    means: np.ndarray
    covariance: np.ndarray

    def exact(self, rng, num):
        which = rng.choice(len(self.shares), size=num, p=self.shares)
        return self.means[which] + rng.normal(size=(num, len(self.covariance))) @ np.linalg.cholesky(self.covariance).T

    def responsibilities(self, x):
        """Compute the posterior probability of every component at each draw."""
        precision = np.linalg.inv(self.covariance)
        moved = x[:, None] - self.means
        log_p = np.log(np.maximum(self.shares, 1e-300)) - 0.5 * np.einsum("nki,ij,nkj->nk", moved, precision, moved)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)


def mixture(seed: int, dim: int, num_rows: int) -> Mixture:
    rng = np.random.default_rng([seed, dim, num_rows])
    grid = np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3), indexing="ij"), -1).reshape(25, 2)
    means, weights = np.tile(8.0 * grid, dim // 2), rng.chisquare(1, size=25)
    weights = weights / weights.sum()
    left, _, right = np.linalg.svd(rng.normal(size=(num_rows, dim)), full_matrices=False)
    rows = left @ np.diag(np.sort(rng.uniform(size=num_rows))[::-1]) @ right
    scale = np.full(num_rows, max(rng.uniform() * np.abs(rows).max(), 0.05))
    y = rows @ (means[rng.choice(25, p=weights)] + rng.normal(size=dim)) + scale * rng.normal(size=num_rows)
    noisy = rows @ rows.T + np.diag(scale**2)
    gain = rows.T @ np.linalg.inv(noisy)
    residual = y - means @ rows.T
    log_share = np.log(weights) - 0.5 * np.einsum("ki,ij,kj->k", residual, np.linalg.inv(noisy), residual)
    shares = np.exp(log_share - log_share.max())
    score = MixtureScore(*_float32(weights, means, np.ones(25)))
    seen = GaussianLikelihood(*_float32(Rows(jnp.asarray(rows)), y, scale))
    return Mixture(score, seen, shares / shares.sum(), means + residual @ gain.T, np.eye(dim) - gain @ rows)


def mixture_figures(seed: int, dim: int, num_rows: int, num: int, num_particles: int) -> dict[str, float]:
    """Mode weights and sliced distances of weighted draws, beside exact draws and guidance without weights."""
    case, rng, process = mixture(seed, dim, num_rows), np.random.default_rng(seed), Noising(VE(0.02, 100.0))
    exact, floor, even = case.exact(rng, 16_384), case.exact(rng, num), np.full(num, 1 / num)

    def sampled(guide, num_particles=1):
        x, log_weight = drawn(TwistedNoise(guide(case.score, case.seen), process, dim, 64, num_particles), seed, num)
        return np.where(np.isfinite(x), x, 1e3), log_weight  # a draw that diverged is far from every mode

    def total_variation(x, w):
        return 0.5 * np.abs(w @ case.responsibilities(x) - case.shares).sum()

    x, log_weight = sampled(MomentMatched, num_particles)
    w, certificate = relative_weights(log_weight), certify_weights(log_weight)
    w = w / w.sum()
    figures = {
        "tv": total_variation(x, w), "tv_exact": total_variation(floor, even),
        "sliced": _sliced(x, w, exact), "sliced_exact": _sliced(floor, even, exact),
        "ess_share": certificate.ess / num, "certified": float(certificate.certified),
    }  # fmt: skip
    for name, guide in (("mmps", MomentMatched), ("sda", partial(Steered, gamma=1e-2)), ("dps", Published)):
        figures[f"tv_{name}"] = total_variation(sampled(guide)[0], even)
    return figures


def mixtures(seed: int, dim: int, num_rows: int, *, problems: int, num: int, num_particles: int) -> dict[str, float]:
    """Medians over problems."""
    found = [mixture_figures(seed + number, dim, num_rows, num, num_particles) for number in range(problems)]
    figures = {name: float(np.median([one[name] for one in found])) for name in found[0]}
    worst = {"certified": min(one["certified"] for one in found), "tv_worst": max(one["tv"] for one in found)}
    return figures | worst | {"sliced_ratio": figures["sliced"] / figures["sliced_exact"]}


def _sliced(x, w, exact, num: int = 200):
    """Compute the sliced Wasserstein-1 distance of weighted draws from exact ones, over fixed directions."""
    directions = np.random.default_rng(0).normal(size=(x.shape[1], num))
    directions /= np.linalg.norm(directions, axis=0)
    levels, total = (np.arange(1000) + 0.5) / 1000, 0.0
    for own, theirs in zip((x @ directions).T, (exact @ directions).T, strict=True):
        order = np.argsort(own)
        rows = np.minimum(np.searchsorted(np.cumsum(w[order]), levels), len(w) - 1)
        total += np.abs(own[order][rows] - np.quantile(theirs, levels)).mean()
    return total / num


# --- critically damped Langevin


def damped(seed: int, num: int = 20_000):
    """Moments against a fine integration of their equations; the splitting on N(1.5, .3^2) with the exact score."""
    process = CriticallyDamped()
    rates = process.beta * np.array([[0.0, 1 / process.mass], [-1.0, -process.friction / process.mass]])
    push = np.diag([0.0, 2 * process.friction * process.beta])
    mean, covariance = np.eye(2), np.diag([0.0, process.start_share * process.mass])
    steps, worst = 20_000, 0.0
    for k in range(steps):  # the classical Runge-Kutta method
        mean, covariance = _runge_kutta(rates, push, mean, covariance, 1.0 / steps)
        if (k + 1) % (steps // 10) == 0:
            found = process.marginal(jnp.array((k + 1) / steps))
            errors = (
                np.abs(np.asarray(found.mean) - mean).max(),
                np.abs(np.asarray(found.covariance) - covariance).max(),
            )
            worst = max(worst, *errors)
    exact = GaussianVelocity(process, jnp.array([1.5]), jnp.array([0.09]))
    figures = {"moments_error": worst}
    for num_steps in (5, 10, 20, 50):
        sampler, keys = SymmetricSplitting(process, num_steps), jax.random.split(jax.random.key(seed), num)
        x = jax.jit(jax.vmap(lambda key, sampler=sampler: sampler.sample(key, exact, 1)[0]))(keys)
        figures[f"sd_{num_steps}"] = float(x.std())
    return figures


def _runge_kutta(rates, push, mean, covariance, step):
    def slope(mean, covariance):
        moved = rates @ covariance
        return rates @ mean, moved + moved.T + push

    def at(slopes, share):
        return mean + share * step * slopes[0], covariance + share * step * slopes[1]

    one = slope(mean, covariance)
    two = slope(*at(one, 0.5))
    three = slope(*at(two, 0.5))
    four = slope(*at(three, 1.0))
    total = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(one, two, three, four, strict=True)]
    return at(total, 1.0)


def rows(seed: int) -> Iterator:
    """Yield a name and a function for every row."""
    yield "linear_gaussian", lambda: linear_gaussian(seed)
    for num_rows in (1, 2, 4):
        yield f"mixture_8/{num_rows}", partial(mixtures, seed, 8, num_rows, problems=4, num=1024, num_particles=8)
    for num_rows in (1, 2, 4):
        yield f"mixture_80/{num_rows}", partial(mixtures, seed, 80, num_rows, problems=1, num=512, num_particles=1)
    yield "critically_damped", lambda: damped(seed)
