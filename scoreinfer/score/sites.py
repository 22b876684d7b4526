"""Expectation propagation: Gaussian sites in place of the factors of a likelihood, for a Gaussian prior.

With u ~ N(m, P) and the likelihood prod_i g_i(u_i), every g_i is replaced by s_i exp(nu_i u_i - tau_i u_i^2 / 2). A
site is updated from its *cavity*, the Gaussian posterior of u_i without the site: cavity times g_i must have the same
mass, mean and variance as cavity times the new site.

References: Minka 2001, "Expectation Propagation for Approximate Bayesian Inference"; Rasmussen and Williams 2006,
section 3.6.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._quadrature import tilt

NUM_SWEEPS, DAMPING = 4, 0.8
"""Updates of all sites at once, and the share of the way that an update goes. Chosen by judgement: linear Gaussian
sites are right after one whole step, others change little after two."""
LEAST = 1e-10
"""Least precision and relative variance, so that nothing divides by zero."""

Values = Float[Array, " obs"]


class Sites(NamedTuple):
    """Gaussian sites.

    Args:
        tau: precision of every site, not negative.
        nu: precision times location.
        log_scale: sum of the log s_i.
    """

    tau: Values
    nu: Values
    log_scale: Float[Array, ""]


def propagate_expectations(
    mean: Values, covariance: Float[Array, "obs obs"], log_sites: Callable[[Values], Values]
) -> Sites:
    """Find the Gaussian sites of u ~ N(mean, covariance), given log g_i(u_i) of all i at once.

    Exactness: exact for Gaussian g_i; else biased, with the right moments to a good approximation. A precision that
        would be negative (g_i is not log-concave) is set to zero, and the mean is kept.
    """

    def sweep(sites: tuple[Values, Values], share: Array) -> tuple[tuple[Values, Values], Array]:
        tau, nu = sites
        cavity_mean, cavity_variance = _cavity(mean, covariance, tau, nu)
        tilted = tilt(log_sites, cavity_mean, cavity_variance)
        new_tau = jnp.maximum(1 / tilted.variance, 1 / cavity_variance) - 1 / cavity_variance + least
        new_nu = tilted.mean * (new_tau + 1 / cavity_variance) - cavity_mean / cavity_variance
        return (tau + share * (new_tau - tau), nu + share * (new_nu - nu)), share

    least = LEAST / (covariance.diagonal() + jnp.finfo(mean.dtype).tiny)  # the root of zero has no derivative
    shares = jnp.array([1.0] + [DAMPING] * (NUM_SWEEPS - 1), mean.dtype)
    (tau, nu), _ = jax.lax.scan(sweep, (least, jnp.zeros_like(mean)), shares)
    cavity_mean, cavity_variance = _cavity(mean, covariance, tau, nu)
    total, log_mass = tau + 1 / cavity_variance, tilt(log_sites, cavity_mean, cavity_variance).log_evidence
    square = (nu + cavity_mean / cavity_variance) ** 2 / total - cavity_mean**2 / cavity_variance
    return Sites(tau, nu, (log_mass + 0.5 * jnp.log(total * cavity_variance) - 0.5 * square).sum())


def _cavity(mean: Values, covariance: Float[Array, "obs obs"], tau: Values, nu: Values) -> tuple[Values, Values]:
    """Compute means and variances of the posterior of every u_i without its own site."""
    root, force = jnp.sqrt(tau), nu - tau * mean
    inner = jnp.linalg.cholesky(jnp.eye(mean.size, dtype=mean.dtype) + root[:, None] * covariance * root)
    moved = jax.scipy.linalg.solve_triangular(inner, root[:, None] * covariance, lower=True)
    centre = mean + covariance @ force - moved.T @ (moved @ force)
    variance = covariance.diagonal() - (moved**2).sum(0)
    variance = jnp.maximum(variance, LEAST * covariance.diagonal() + jnp.finfo(mean.dtype).tiny)
    cavity_variance = 1 / jnp.maximum(1 / variance - tau, LEAST / variance)
    return cavity_variance * (centre / variance - nu), cavity_variance
