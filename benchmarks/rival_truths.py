"""What is known about the targets of `rivals.py`: means, modes' weights, evidences, by closed form and quadrature."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logsumexp, ndtr, ndtri
from scipy.stats import halfcauchy, multivariate_t, norm
from unimodal import ERRORS

import oracles

NUM = 200_000


class Truth(NamedTuple):
    """What is known.

    Args:
        mean: the means.
        sd: the standard deviations.
        log_evidence: log of the normalising constant.
        modes: the modes' weights; empty: nothing to count.
        mode_of: number of the mode of every draw.
    """

    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float
    modes: np.ndarray = np.zeros(0)
    mode_of: Callable[[np.ndarray], np.ndarray] = lambda theta: np.zeros(len(theta), int)


def densities_truth(density: oracles.Density) -> Truth:
    """A bare density's own answers; means and standard deviations by exact draws."""
    draws = density.sample(np.random.default_rng(0), NUM)
    return Truth(draws.mean(0), draws.std(0), density.log_evidence, density.modes, density.mode_of)


def two_moons_truth(y: np.ndarray, reference: np.ndarray) -> Truth:
    """Mirror images in theta1 + theta2; the evidence by a grid over the crescent's noise.

    The shift (-|theta1 + theta2|, theta2 - theta1) / sqrt 2 keeps areas, so that the evidence is the prior's density,
    a quarter, times the noise's probability of coming from the square, once for each sign of the sum.
    """
    radius = 0.1 + 0.01 * ndtri((np.arange(400) + 0.5) / 400)
    angle = np.pi * ((np.arange(4000) + 0.5) / 4000 - 0.5)
    shift = np.stack([y[0] - 0.25 - np.outer(radius, np.cos(angle)), y[1] - np.outer(radius, np.sin(angle))])
    total, difference = -np.sqrt(2) * shift[0], np.sqrt(2) * shift[1]
    inside = (total > 0) & (np.abs(total - difference) < 2) & (np.abs(total + difference) < 2)
    log_evidence = float(np.log(2 * 0.25 * inside.mean()))
    return Truth(reference.mean(0), reference.std(0), log_evidence, np.full(2, 0.5),
                 lambda theta: (theta.sum(1) > 0).astype(int))  # fmt: skip


def slcp_truth(y: np.ndarray, reference: np.ndarray, num: int = 60) -> Truth:
    """Mirror images in theta3 and theta4; the evidence by a grid over the covariance, means integrated out.

    Given the covariance S, the means' integral over the prior's square is that of four bivariate normals, and of these
    means' probability N(ybar, S / 4) of lying in the square, itself by a rule in the first mean's quantiles.
    """
    grid = (np.arange(num) + 0.5) / num
    first, second, third = np.meshgrid(3 * grid, 3 * grid, 6 * grid - 3, indexing="ij")
    s1, s2, r = first**2, second**2, np.tanh(third)
    v1, v2, cross = s1**2 + 1e-6, s2**2 + 1e-6, r * s1 * s2
    det, (m1, m2) = v1 * v2 - cross**2, y.mean(0)
    (c11, c12), (_, c22) = (y - y.mean(0)).T @ (y - y.mean(0))
    log_p = -4 * np.log(2 * np.pi) - 2 * np.log(det) - 0.5 * (v2 * c11 - 2 * cross * c12 + v1 * c22) / det
    log_p += np.log(2 * np.pi) + 0.5 * np.log(det / 16)
    low, high = ndtr((-3 - m1) / np.sqrt(v1 / 4)), ndtr((3 - m1) / np.sqrt(v1 / 4))
    rest, inside = np.sqrt(det / v1 / 4), 0.0
    for node in (np.arange(16) + 0.5) / 16:
        mean = m2 + cross / v1 * np.sqrt(v1 / 4) * ndtri(low + node * (high - low))
        inside = inside + (ndtr((3 - mean) / rest) - ndtr((-3 - mean) / rest)) / 16
    with np.errstate(divide="ignore"):
        log_p += np.log(inside * (high - low))
    # A cell is 3 * 3 * 6 / num^3, there are four pairs of signs, and the prior's density is 6^-5.
    log_evidence = float(logsumexp(log_p) - 3 * np.log(num) - 2 * np.log(6))
    return Truth(reference.mean(0), reference.std(0), log_evidence, np.full(4, 0.25),
                 lambda theta: 2 * (theta[:, 2] > 0) + (theta[:, 3] > 0))  # fmt: skip


def eight_schools_truth(y: np.ndarray) -> Truth:
    """Given the spread everything is Gaussian: exact draws and evidence by a grid of the spread's logarithm.

    The "modes" are the funnel's neck and mouth, spreads below and above their posterior median.
    """
    rng, grid = np.random.default_rng(0), np.linspace(-16.0, 9.0, 50_001)
    tau = np.exp(grid)
    precision = 1 / (tau[:, None] ** 2 + ERRORS.astype(float) ** 2)
    mean_precision = 1 / 25 + precision.sum(1)
    mean = (precision * y).sum(1) / mean_precision
    log_p = halfcauchy.logpdf(tau, scale=5) + grid + 0.5 * np.log(precision).sum(1) - 4 * np.log(2 * np.pi)
    log_p += -0.5 * (precision * y**2).sum(1) + 0.5 * mean**2 * mean_precision - 0.5 * np.log(25 * mean_precision)
    log_evidence = float(logsumexp(log_p) + np.log(grid[1] - grid[0]))
    cumulative = np.cumsum(np.exp(log_p - logsumexp(log_p)))
    median = np.exp(np.interp(0.5, cumulative, grid))
    at = np.interp(rng.uniform(size=NUM), cumulative, grid)
    spread = np.exp(at)
    centre = np.interp(at, grid, mean) + rng.normal(size=NUM) / np.sqrt(np.interp(at, grid, mean_precision))
    weight = 1 / (1 + (ERRORS.astype(float) / spread[:, None]) ** 2)
    effect = centre[:, None] + weight * (y - centre[:, None])
    effect += np.sqrt(weight) * ERRORS * rng.normal(size=(NUM, 8))
    draws = np.column_stack([centre, spread, effect])
    return Truth(draws.mean(0), draws.std(0), log_evidence, np.full(2, 0.5),
                 lambda theta: (theta[:, 1] > median).astype(int))  # fmt: skip


def logistic_truth(x: np.ndarray, y: np.ndarray) -> Truth:
    """Importance weights of a multivariate t at the maximum: 200,000 draws, most of them effective."""
    design, sign = np.column_stack([np.ones(len(x)), x]).astype(float), 2.0 * y - 1
    top = np.zeros(design.shape[1])
    for _ in range(20):
        p = expit(design @ top)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(len(top))
        top += np.linalg.solve(hessian, design.T @ (y - p) - top)
    proposal = multivariate_t(top, 1.1 * np.linalg.inv(hessian), df=30, seed=0)
    draws = proposal.rvs(NUM)
    log_joint = norm.logpdf(draws).sum(1) + log_likelihood_of_signs(draws, design, sign)
    log_weight = log_joint - proposal.logpdf(draws)
    weight = np.exp(log_weight - logsumexp(log_weight))
    mean = weight @ draws
    return Truth(mean, np.sqrt(weight @ (draws - mean) ** 2), float(logsumexp(log_weight) - np.log(NUM)))


def log_likelihood_of_signs(draws: np.ndarray, design: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Compute the log likelihood of logistic regressions in chunks of rows."""
    chunks = np.array_split(draws, 20)
    return np.concatenate([-np.logaddexp(0.0, -sign * (chunk @ design.T)).sum(1) for chunk in chunks])
