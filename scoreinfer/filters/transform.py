"""Move an ensemble so that it has the posterior's mean and covariance, by the symmetric square root.

With sites of precision T and B = I + T^(1/2) C T^(1/2),

    a_i' = a_i - C_i T^(1/2) (B + B^(1/2))^(-1) T^(1/2) a

gives the anomalies the posterior covariance, where C is their own. Of all square roots this one moves them least.

References: Whitaker and Hamill 2002, MWR 130, equation 10 (the reduced gain); Hunt, Kostelich and Szunyogh 2007,
Physica D 230 (local, symmetric).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.filters.sites import Prior, block, marginal, over_points
from scoreinfer.filters.spectral import inverse_and_root
from scoreinfer.score.sites import Sites


def transform(prior: Prior, sites: Sites, anomalies: Float[Array, "num points"]) -> Float[Array, "num points"]:
    """Move the members.

    Args:
        prior: the prior.
        sites: the sites.
        anomalies: the members less their mean, noise of variance ``prior.added`` included.

    Exactness: exact for one block without a taper, where C is the anomalies' own covariance: their mean and covariance
        become the posterior's. Otherwise biased as the blocks are.
    """

    def moved(point):
        part = block(prior, sites, point)
        mean, _ = marginal(prior, sites, point)
        inverse, root = inverse_and_root(part.system)
        eye = jnp.eye(root.shape[0], dtype=root.dtype)
        gain = part.root * jnp.linalg.solve(eye + root, inverse @ (part.root * part.covariance[0]))
        return mean + anomalies[:, point] - anomalies[:, prior.locality.index[point]] @ gain

    return over_points(moved, prior.mean.size).T
