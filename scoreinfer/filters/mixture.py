"""A Gaussian mixture around the members: between the Gaussian of all members and one particle for each.

The prior is sum_j w_j N(m + s (x_j - m), h^2 C) / N with s = sqrt(1 - h^2): for every bandwidth h it has the members'
own mean and covariance. Expectation propagation gives each component its posterior and its evidence Z_j. Components are
drawn in proportion to Z_j, and a member from each component drawn.

References: West 1993, JRSS B 55(2) (shrunken kernels); Kotecha and Djuric 2003, IEEE TSP 51(10) (Gaussian sum particle
filters); Frei and Kuensch 2013, Biometrika 100(4) (between ensemble Kalman and particle filters).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._quadrature import Numbers
from scoreinfer._typing import Key
from scoreinfer.filters.sites import Prior, block, marginals
from scoreinfer.filters.spectral import inverse_and_root, shrunk
from scoreinfer.filters.taper import everywhere
from scoreinfer.montecarlo.resampling import systematic
from scoreinfer.montecarlo.weights import log_mean_weight
from scoreinfer.score.sites import Sites

Ensemble = Float[Array, "num points"]
Fit = Callable[[Prior], tuple[Sites, Float[Array, ""]]]
"""Finds the sites of a Gaussian prior, and its log evidence."""


def analyse_mixture(key: Key, prior: Prior, bandwidth: float, fit: Fit) -> tuple[Ensemble, Float[Array, ""]]:
    """Draw members from the posterior of the mixture; return them with the log evidence.

    Args:
        key: random key.
        prior: the Gaussian prior of all members, one block without a taper.
        bandwidth: h.
        fit: finds sites and evidence of one component.

    Exactness: consistent as the number of members grows and h falls, for every law of the members; the evidence of one
        component is exact for Gaussian likelihoods, else to the accuracy of expectation propagation.
    """
    num, points = prior.anomalies.shape
    for_rows, for_draws = jax.random.split(key)
    covariance = prior.anomalies.T @ prior.anomalies / (num - 1) + jnp.diag(prior.added)
    root = bandwidth * _root(covariance)
    rows = jnp.sqrt(1.0 * points) * jnp.concatenate([root, jnp.zeros((1, points))])  # their sample covariance is h^2 C
    centres = prior.mean + jnp.sqrt(1.0 - bandwidth**2) * prior.anomalies
    components = jax.vmap(lambda mean: Prior(mean, rows, jnp.zeros(points), everywhere(points)))(centres)
    sites, log_evidence = jax.vmap(fit)(components)
    chosen = systematic(for_rows, log_evidence, num)
    noise = jax.random.normal(for_draws, (num, points + 1), centres.dtype)
    priors, found = jax.tree.map(lambda leaf: leaf[chosen], (components, sites))

    def drawn(prior: Prior, sites: Sites, noise: Numbers) -> Numbers:
        near_all = block(prior, sites, jnp.zeros((), int))
        columns = prior.anomalies / jnp.sqrt(1.0 * points)
        return marginals(prior, sites)[0] + shrunk(near_all.small, noise) @ columns

    return jax.vmap(drawn)(priors, found, noise), log_mean_weight(log_evidence)


def _root(covariance: Float[Array, "points points"]) -> Float[Array, "points points"]:
    """Compute the symmetric root C (C^(-1/2)), with a little added where a direction has no variance."""
    scale = jnp.finfo(covariance.dtype).eps * jnp.trace(covariance) + jnp.finfo(covariance.dtype).tiny
    regular = covariance + scale * jnp.eye(len(covariance))
    return regular @ inverse_and_root(regular)[1]
