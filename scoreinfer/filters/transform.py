"""Move an ensemble to the posterior's means and variances, by the symmetric square root.

With M = I + S T S^T for the sites near a point (`scoreinfer.filters.sites`), the anomalies of the point become

    a' = M^(-1/2) a,

stretched by the factor that gives them the variance of the point's marginal: one, but where noise was added. Of all
square roots this one moves members least, and neighbours nearly alike.

References: Hunt, Kostelich and Szunyogh 2007, Physica D 230, section 2.3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.filters.sites import Prior, block, marginal, over_points
from scoreinfer.filters.spectral import shrunk
from scoreinfer.score.sites import Sites


def transform(prior: Prior, sites: Sites, anomalies: Float[Array, "num points"]) -> Float[Array, "num points"]:
    """Move the members.

    Args:
        prior: the prior.
        sites: the sites.
        anomalies: the members less their mean, noise of variance ``prior.added`` included.

    Exactness: exact for one block without a taper and without added noise: mean and covariance of the members become
        the posterior's. Otherwise means and variances are those of `marginals`, and correlations biased as blocks are.
    """
    num = anomalies.shape[0]

    def moved(point):
        mean, variance = marginal(prior, sites, point)
        part = block(prior, sites, point)
        a = shrunk(part.small, anomalies[:, point])
        own = jnp.sum(a**2) / (num - 1)
        return mean + jnp.sqrt(variance / jnp.where(own > 0.0, own, 1.0)) * a

    return over_points(moved, prior.mean.size).T
