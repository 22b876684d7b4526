"""A linear Gaussian state-space model beside its Kalman filter and smoother, in double precision by NumPy."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import stats

import scoreinfer as si


class Linear(NamedTuple):
    """x' ~ N(move x, noise^2), y ~ N(see x, error^2), x_0 ~ N(0, I)."""

    move: np.ndarray
    noise: float
    see: np.ndarray
    error: float

    @property
    def dim(self):
        return len(self.move)

    def space(self):
        move, see = jnp.asarray(self.move), jnp.asarray(self.see)
        return si.StateSpace(
            dist.Normal(jnp.zeros(self.dim), 1.0).to_event(1),
            lambda t0, t1, x: dist.Normal(move @ x, self.noise).to_event(1),
            lambda t, x: dist.Normal(see @ x, self.error).to_event(1),
        )

    def simulate(self, seed, num):
        rng, x, y = np.random.default_rng(seed), None, []
        x = rng.standard_normal(self.dim)
        for _ in range(num):
            x = self.move @ x + self.noise * rng.standard_normal(self.dim)
            y.append(self.see @ x + self.error * rng.standard_normal(len(self.see)))
        return np.stack(y).astype(np.float32)

    def kalman(self, y):
        """Compute filtered means and covariances at all times, and the log evidence; NaN is missing."""
        mean, cov = np.zeros(self.dim), np.eye(self.dim)
        means, covs, log_evidence = [], [], 0.0
        for row in np.asarray(y, np.float64):
            mean, cov = self.move @ mean, self.move @ cov @ self.move.T + self.noise**2 * np.eye(self.dim)
            has = ~np.isnan(row)
            if has.any():
                see = self.see[has]
                total = see @ cov @ see.T + self.error**2 * np.eye(has.sum())
                log_evidence += stats.multivariate_normal(see @ mean, total).logpdf(row[has])
                gain = cov @ see.T @ np.linalg.inv(total)
                mean, cov = mean + gain @ (row[has] - see @ mean), cov - gain @ see @ cov
            means.append(mean)
            covs.append(cov)
        return np.stack(means), np.stack(covs), log_evidence

    def smooth(self, y):
        """Compute smoothed means and covariances (Rauch, Tung and Striebel)."""
        means, covs, _ = self.kalman(y)
        smooth, spread = [means[-1]], [covs[-1]]
        for mean, cov in zip(means[-2::-1], covs[-2::-1], strict=True):
            ahead = self.move @ cov @ self.move.T + self.noise**2 * np.eye(self.dim)
            gain = cov @ self.move.T @ np.linalg.inv(ahead)
            smooth.append(mean + gain @ (smooth[-1] - self.move @ mean))
            spread.append(cov + gain @ (spread[-1] - ahead) @ gain.T)
        return np.stack(smooth[::-1]), np.stack(spread[::-1])


AR1 = Linear(np.array([[0.9]]), 0.6, np.array([[1.0]]), 0.8)
TURN = Linear(0.95 * np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]), 0.4, np.eye(2), 0.5)
PARTLY = TURN._replace(see=np.array([[1.0, 1.0]]))
