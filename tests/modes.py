"""Oracles: linear physics of independent components (Ornstein-Uhlenbeck, heat in Fourier modes), seen at its end.

Every component's path is Gaussian with a known covariance, so that the smoother (Rauch-Tung-Striebel), the evidence
and the score are closed formulas.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats
from scipy.special import logsumexp

import scoreinfer as si
from scoreinfer.model import read_physics
from scoreinfer.process import Physics
from scoreinfer.process.physics import add_noise_stage


class Modes(NamedTuple):
    """dx = -rate x dt + g dW, component by component, with exact steps; y = x_N + noise."""

    name: str
    rates: np.ndarray
    start_sd: np.ndarray
    g: float
    ts: np.ndarray
    noise: float
    step_scale: float | None = None  # noise of every step, where it is not that of the exact step

    @property
    def factors(self):
        return np.exp(-np.diff(self.ts)[:, None] * self.rates)

    @property
    def scales(self):
        h = np.diff(self.ts)[:, None]
        if self.step_scale is not None:
            return np.full((len(h), len(self.rates)), self.step_scale)
        return self.g * np.sqrt(-np.expm1(-2 * h * self.rates) / (2 * self.rates))

    def model(self, y=None):
        x = numpyro.sample("x", self.path())
        numpyro.sample("y", dist.Normal(x[-1], self.noise).to_event(1), obs=y)

    def path_model(self):
        numpyro.sample("x", self.path())

    def path(self):
        rates = jnp.asarray(self.rates)
        start = dist.Normal(jnp.zeros(len(rates)), jnp.asarray(self.start_sd)).to_event(1)
        return si.PhysicsPath(lambda t0, t1, x: x * jnp.exp(-rates * (t1 - t0)), self.scales, self.ts, start)

    def process(self, noise_stage=True):
        """Read the physics, with its exact inverse as reverse and the observation's noise as one more step."""
        rates = jnp.asarray(self.rates)
        physics = Physics("x", lambda t0, t1, x: x * jnp.exp(rates * (t1 - t0)))
        process = read_physics(physics, self.model)
        return add_noise_stage(process, jnp.full(len(rates), self.noise)) if noise_stage else process

    def covariances(self, noise_stage=True):
        """Covariance of every component's path and (last) its observation: ``(dim, times + 1, times + 1)``."""
        factors, scales = self.factors, self.scales
        if noise_stage:
            factors = np.concatenate([factors, np.ones((1, len(self.rates)))])
            scales = np.concatenate([scales, np.full((1, len(self.rates)), self.noise)])
        return np.stack([self._joint(factors[:, i], scales[:, i], sd) for i, sd in enumerate(self.start_sd)])

    def _joint(self, factors, scales, start_sd):
        covariance = np.zeros((len(factors) + 1,) * 2)
        covariance[0, 0] = start_sd**2
        for k, (factor, scale) in enumerate(zip(factors, scales, strict=True)):
            covariance[k + 1, : k + 1] = covariance[: k + 1, k + 1] = factor * covariance[k, : k + 1]
            covariance[k + 1, k + 1] = factor**2 * covariance[k, k] + scale**2
        return covariance

    def score(self, noise_stage=True):
        """The exact score at the times of the process's grid."""
        variances = jnp.asarray(self.covariances(noise_stage).diagonal(axis1=1, axis2=2).T, jnp.float32)
        ts = self.process(noise_stage).ts
        return lambda t, x: -x / variances[jnp.argmin(jnp.abs(ts - t))]

    def smoother(self, end, noise_stage=True):
        """Means ``(times, dim)`` and covariances ``(dim, times, times)`` of the path before the end, and log p(end)."""
        joint = self.covariances(noise_stage)
        gain = joint[:, :-1, -1] / joint[:, -1, -1:]
        covariance = joint[:, :-1, :-1] - gain[:, :, None] * joint[:, None, :-1, -1]
        variance = joint[:, -1, -1]
        log_evidence = -0.5 * np.sum(end**2 / variance + np.log(2 * np.pi * variance))
        return gain.T * end, covariance, float(log_evidence)

    def smoother_of(self, times, y):
        """The same of the whole path where states at several times are seen: ``y = x[times] + noise``, by row."""
        joint = self.covariances(False)
        within = joint[:, times][:, :, times] + self.noise**2 * np.eye(len(times))
        gain = joint[:, :, times] @ np.linalg.inv(within)
        covariance = joint - gain @ joint[:, times]
        quadratic = np.einsum("ti,its,si->", y, np.linalg.inv(within), y)
        log_evidence = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * within)[1].sum())
        return np.einsum("ist,ti->si", gain, y), covariance, float(log_evidence)

    def disagreement(self, paths, log_weight, end, noise_stage=True):
        """Largest distance, in standard errors, of weighted paths' moments from the smoother's."""
        mean, covariance, _ = self.smoother(end, noise_stage)
        return moments_off(np.asarray(paths)[:, : len(mean)], log_weight, mean, covariance)


def moments_off(paths, log_weight, mean, covariance):
    """Largest distance, in standard errors, of weighted paths' means, variances and cross-time covariances."""
    weight = np.exp(np.asarray(log_weight, np.float64) - np.max(log_weight))
    weight /= weight.sum()
    ess = 1 / np.sum(weight**2)
    centred = np.asarray(paths, np.float64) - mean
    sd = np.sqrt(covariance.diagonal(axis1=1, axis2=2)).T
    first = np.abs(np.einsum("n,nti->ti", weight, centred) / sd).max() * np.sqrt(ess)
    found = np.einsum("n,nti,nsi->its", weight, centred, centred)
    sds = sd.T[:, :, None] * sd.T[:, None, :]
    second = np.abs((found - covariance) / np.sqrt(sds**2 + covariance**2)).max() * np.sqrt(ess)
    return float(max(first, second))


class UnknownRate(NamedTuple):
    """Ornstein-Uhlenbeck with a rate of its own prior, LogNormal(0, 0.5), in every component; some states are seen.

    Args:
        modes: everything but the rate.
        times: numbers of the states seen, each with the noise; the last alone: a noisy end.
    """

    modes: Modes
    times: tuple[int, ...]

    def path_model(self):
        modes = self.modes
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        start = dist.Normal(jnp.zeros(len(modes.start_sd)), jnp.asarray(modes.start_sd)).to_event(1)
        h = jnp.diff(modes.ts)[:, None]
        scales = modes.g * jnp.sqrt(-jnp.expm1(-2 * h * rate) / (2 * rate)) * jnp.ones(len(modes.start_sd))
        decay = lambda t0, t1, x: x * jnp.exp(rate * (t0 - t1))  # noqa: E731
        return numpyro.sample("x", si.PhysicsPath(decay, scales, modes.ts, start))

    def model(self, y=None):
        x = self.path_model()
        seen = x[-1] if self.times == (len(x) - 1,) else x[jnp.array(self.times)]
        numpyro.sample("y", dist.Normal(seen, self.modes.noise).to_event(seen.ndim), obs=y)

    def grid(self, y):
        """Log rates, their log masses (of evidence in sum), and for each of them means and covariances of paths."""
        grid = np.linspace(-3.0, 3.0, 601)
        answers = []
        for log_rate in grid:
            modes = self.modes._replace(rates=np.full(len(self.modes.start_sd), np.exp(log_rate)))
            answers.append(modes.smoother_of(list(self.times), np.atleast_2d(y)))
        means, covariances, log_likelihood = (np.stack(part) for part in zip(*answers, strict=True))
        return grid, stats.norm(0.0, 0.5).logpdf(grid) + np.log(grid[1] - grid[0]) + log_likelihood, means, covariances

    def draws(self, rng, y, num):
        """Draws of log rate and path, in one row each (up to the width of the grid's cells)."""
        grid, log_mass, means, covariances = self.grid(y)
        rows = rng.choice(len(grid), num, p=np.exp(log_mass - logsumexp(log_mass)))
        noise = rng.standard_normal((num, *means.shape[:0:-1]))
        roots = np.linalg.cholesky(covariances[rows] + 1e-12 * np.eye(covariances.shape[-1]))
        paths = means[rows] + np.einsum("nits,nis->nti", roots, noise)
        rates = grid[rows] + (grid[1] - grid[0]) * (rng.random(num) - 0.5)
        return np.concatenate([rates[:, None], paths.reshape(num, -1)], axis=1)

    def truth(self, y):
        """Mean and sd of the log rate, log evidence, means and covariances of paths: by a grid over the rate."""
        grid, log_mass, means, covariances = self.grid(y)
        log_evidence = logsumexp(log_mass)
        mass = np.exp(log_mass - log_evidence)
        mean = np.einsum("r,rti->ti", mass, means)
        within = np.einsum("r,rits->its", mass, covariances)
        between = np.einsum("r,rti,rsi->its", mass, means - mean, means - mean)
        centre = mass @ grid
        return centre, np.sqrt(mass @ (grid - centre) ** 2), log_evidence, mean, within + between


def ornstein_uhlenbeck(num_steps=8):
    """Two components, one of them slow, on an irregular grid."""
    ts = np.linspace(0.0, 1.0, num_steps + 1) ** 1.3
    return Modes("ornstein_uhlenbeck", np.array([0.5, 3.0]), np.array([1.0, 0.6]), 0.7, ts, 0.3)


def heat(num_steps=16, num_modes=32):
    """The heat equation in sines and cosines: rates kappa^2, initial power kappa^-4."""
    kappa = np.arange(num_modes) // 2 + 1.0
    return Modes("heat", kappa**2, kappa**-2.0, 0.1, np.linspace(0.0, 0.2, num_steps + 1), 0.01)


class Ring(NamedTuple):
    """Heat on a ring of points, as a field: its Hartley coefficients are the modes, whose smoother is known."""

    modes: Modes

    def path(self):
        size, rates = len(self.modes.rates), jnp.asarray(self.modes.rates)
        angle = 2 * np.pi / size * np.outer(np.arange(size), np.arange(size))
        waves = jnp.asarray((np.cos(angle) + np.sin(angle)) / np.sqrt(size), jnp.float32)  # `hartley` as a matrix
        step = lambda t0, t1, x: waves @ (jnp.exp(-rates * (t1 - t0)) * (waves @ x))  # noqa: E731
        covariance = waves @ (jnp.asarray(self.modes.start_sd)[:, None] ** 2 * waves)
        start = dist.MultivariateNormal(jnp.zeros(size), covariance)
        return si.PhysicsPath(step, self.modes.step_scale, self.modes.ts, start)

    def path_model(self):
        numpyro.sample("x", self.path())

    def model(self, y=None):
        x = numpyro.sample("x", self.path())
        numpyro.sample("y", dist.Normal(x[-1], self.modes.noise).to_event(1), obs=y)


def ring(size, num_steps=6, smoothness=2.0, end_time=0.3):
    """Power of the start falls by twice ``smoothness``; below that of the noise, Gaussian kernels mix the points."""
    kappa = np.minimum(np.arange(size), size - np.arange(size))
    ts = np.linspace(0.0, end_time, num_steps + 1)
    return Ring(Modes("ring", kappa**2 + 0.1, (1.0 + kappa) ** -smoothness, 0.3, ts, 0.1, 0.1))
