"""Expectation propagation: Gaussian sites in place of the factors of a likelihood, for a Gaussian prior.

With u ~ N(m, P) and the likelihood prod_i g_i(u_i), every g_i is replaced by s_i exp(nu_i u_i - tau_i u_i^2 / 2). A
site is updated from its *cavity*, the Gaussian posterior of u_i without the site: cavity times g_i must have the same
mass, mean and variance as cavity times the new site.

References: Minka 2001, "Expectation Propagation for Approximate Bayesian Inference"; Rasmussen and Williams 2006,
section 3.6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._quadrature import LogLikelihood, Numbers, tilt

LEAST_PRECISION = 1e-6
"""Least precision of a site, relative to its cavity's. Where the exact one is lower, or negative (the likelihood is not
log-concave), the tilted mean is kept."""


class Sites(NamedTuple):
    """Gaussian sites exp(nu x - tau x^2 / 2).

    Args:
        precision: tau; zero where nothing is known of the point.
        shift: nu.
    """

    precision: Numbers
    shift: Numbers


def propagate_expectations(
    mean: Numbers,
    covariance: Float[Array, "points points"],
    log_likelihood: LogLikelihood,
    informed: Bool[Array, " points"] | bool,
    shares: tuple[float, ...],
) -> Sites:
    """Find the Gaussian sites of u ~ N(mean, covariance), given log g_i(u_i) of all i at once.

    Args:
        mean: the prior mean.
        covariance: the prior covariance.
        log_likelihood: log g_i of all i.
        informed: which points have a g_i; the sites of the others stay zero.
        shares: the share of the way that each update of all sites goes.

    Exactness: exact for Gaussian g_i; else biased, with the right moments to a good approximation. A precision that
        would be negative (g_i is not log-concave) is nearly zero, and the mean is kept.
    """

    def sweep(sites: Sites, share: Array) -> tuple[Sites, None]:
        new = matched(*cavities(mean, covariance, sites), log_likelihood, informed)
        return Sites(*(old + share * (value - old) for old, value in zip(sites, new, strict=True))), None

    none = Sites(jnp.zeros_like(mean), jnp.zeros_like(mean))
    return jax.lax.scan(sweep, none, jnp.array(shares, mean.dtype))[0]


def log_product(
    mean: Numbers, covariance: Float[Array, "points points"], log_likelihood: LogLikelihood, sites: Sites
) -> Float[Array, ""]:
    """Compute log prod_i s_i exp(nu_i m_i - tau_i m_i^2 / 2), the sites with their masses at the prior mean m.

    At the mean c of its cavity, of variance v, a site of force f = nu - tau c has the value

        log s exp(nu c - tau c^2 / 2) = log int N(u; c, v) g(u) du + log(1 + tau v) / 2 - f^2 v / (2 (1 + tau v)).
    """
    centre, variance = cavities(mean, covariance, sites)
    force, gain, off = sites.shift - sites.precision * centre, 1.0 + sites.precision * variance, mean - centre
    at_centre = tilt(log_likelihood, centre, variance).log_evidence + 0.5 * jnp.log(gain)
    return (at_centre - 0.5 * force**2 * variance / gain + force * off - 0.5 * sites.precision * off**2).sum()


def matched(
    mean: Numbers, variance: Numbers, log_likelihood: LogLikelihood, informed: Bool[Array, " points"] | bool
) -> Sites:
    """Choose the sites that match the likelihoods, given mean and variance of every cavity."""
    tilted = tilt(log_likelihood, mean, variance)
    precision = jnp.maximum(1.0 / tilted.variance - 1.0 / variance, LEAST_PRECISION / variance)
    shift = tilted.mean * precision + (tilted.mean - mean) / variance
    return Sites(*(jnp.where(informed, value, 0.0) for value in (precision, shift)))


def cavities(
    mean: Numbers, covariance: Float[Array, "points points"], sites: Sites
) -> tuple[Numbers, Float[Array, " points"]]:
    """Compute mean and variance of every number given the sites of the others.

    With B = I + T^(1/2) C T^(1/2), row and column i leave its inverse by B^(-1) - b_i b_i^T / b_ii. No digits are lost
    where a site is precise, as they are where its precision is subtracted from the marginal's.
    """
    root, aim = roots_and_aims(sites, mean)
    rows, eye = root[:, None] * covariance, jnp.eye(mean.size, dtype=mean.dtype)
    right = jnp.concatenate([rows, eye, aim[:, None]], axis=1)
    solved = jax.scipy.linalg.solve(eye + rows * root, right, assume_a="pos")
    half, inverse, pulled = solved[:, : mean.size], solved[:, mean.size : -1], solved[:, -1]
    own = jnp.diag(half) / jnp.diag(inverse)
    variance = jnp.diag(covariance) - (rows * half).sum(0) + own * jnp.diag(half)
    least = jnp.finfo(mean.dtype).eps * jnp.diag(covariance) + jnp.finfo(mean.dtype).tiny
    return mean + rows.T @ pulled - own * pulled, jnp.maximum(variance, least)


def roots_and_aims(sites: Sites, mean: Numbers) -> tuple[Numbers, Numbers]:
    """Compute T^(1/2) and T^(-1/2) (nu - T m); zero, with a derivative, where there is no site."""
    some = sites.precision > 0.0
    root = jnp.sqrt(jnp.where(some, sites.precision, 1.0))
    aim = (sites.shift - sites.precision * mean) / root
    return jnp.where(some, root, 0.0), jnp.where(some, aim, 0.0)
