"""A localised Gaussian prior and scalar likelihoods: the posterior by expectation propagation, block by block.

The prior of the points x is Gaussian, N(m, C), with C = rho o A^T A / (N - 1) + diag(b): a tapered sample covariance,
and variance that is added to every point by itself. Each likelihood p(y_i | x_i) is replaced by a *site*, an
unnormalised Gaussian exp(nu_i x_i - tau_i x_i^2 / 2). Expectation propagation takes site i away, which leaves the
cavity N(x_i; m_i', v_i'), tilts it by the exact likelihood, and chooses the site anew so that mean and variance agree:

    tau_i = 1 / v_tilted - 1 / v',        nu_i = m_tilted / v_tilted - m' / v'.

For a normal likelihood of x_i the site is the likelihood, whatever the cavity. All points are moved at once, and the
marginals of point i are those of its block alone.

References: Minka 2001, UAI; Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", section 3.6 (the
stable form through B = I + T^(1/2) C T^(1/2)).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scoreinfer.filters.integrals import LogLikelihood, Numbers, tilt
from scoreinfer.filters.taper import Locality
from scoreinfer.score import LocalGaussianScore

LEAST_PRECISION = 1e-6
"""Least precision of a site, relative to its cavity's. Where the exact one is lower, or negative (the likelihood is not
log-concave), the tilted mean is kept."""
LEAST_CAVITY = 1e-3
"""Least precision of a cavity, relative to the marginal's."""
CHUNK = 4096
"""Blocks computed at once: memory grows with this number, not with the state."""


class Prior(eqx.Module):
    """The localised Gaussian prior.

    Args:
        mean: m.
        anomalies: A, the members less their mean.
        added: b.
        locality: blocks and taper.
    """

    mean: Numbers
    anomalies: Float[Array, "num points"]
    added: Numbers
    locality: Locality

    @property
    def variance(self) -> Numbers:
        """The variance of every point, without what is added."""
        return jnp.sum(self.anomalies**2, axis=0) / (self.anomalies.shape[0] - 1)

    def covariance(self, point: Int[Array, ""]) -> Float[Array, "block block"]:
        """Compute C on the block of a point; zero where the block is padded."""
        index, present = self.locality.index[point], self.locality.present[point]
        part = self.anomalies[:, index]
        sample = part.T @ part / (self.anomalies.shape[0] - 1)
        tapered = self.locality.taper(index[:, None], index) * sample + jnp.diag(self.added[index])
        return jnp.where(present[:, None] & present, tapered, 0.0)

    def score(self) -> LocalGaussianScore:
        """Make the score that a diffusion filter would follow from this prior."""
        blocks = over_points(self.covariance, self.mean.size)
        return LocalGaussianScore(self.mean, self.locality.index, blocks)


class Sites(NamedTuple):
    """Gaussian sites exp(nu x - tau x^2 / 2).

    Args:
        precision: tau; zero where nothing is known of the point.
        shift: nu.
    """

    precision: Numbers
    shift: Numbers


class Block(NamedTuple):
    """What a block knows of its centre.

    Args:
        covariance: C on the block; the centre comes first.
        root: T^(1/2).
        system: B = I + T^(1/2) C T^(1/2).
        pull: nu - tau m: where the sites pull, away from the prior mean.
    """

    covariance: Float[Array, "block block"]
    root: Float[Array, " block"]
    system: Float[Array, "block block"]
    pull: Float[Array, " block"]


def block(prior: Prior, sites: Sites, point: Int[Array, ""], *, before: bool = False) -> Block:
    """Gather the block of a point; ``before`` takes only sites of points with smaller numbers."""
    index = prior.locality.index[point]
    seen = index < point if before else jnp.ones(index.shape, bool)
    precision, shift = jnp.where(seen, sites.precision[index], 0.0), jnp.where(seen, sites.shift[index], 0.0)
    covariance, root = prior.covariance(point), jnp.sqrt(precision)
    system = jnp.eye(index.size, dtype=root.dtype) + root[:, None] * covariance * root
    return Block(covariance, root, system, shift - precision * prior.mean[index])


def centre(prior: Prior, part: Block, point: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute mean and variance of the centre of a block given its sites: m + c (I + T C)^(-1) (nu - T m), ..."""
    row = part.covariance[0]
    half = part.root * jax.scipy.linalg.solve(part.system, part.root * row, assume_a="pos")
    given = row - half @ part.covariance
    return prior.mean[point] + given @ part.pull, given[0]


def over_points(function: Callable, num: int):
    """Apply a function to the number of every point, many at once."""
    if num <= CHUNK:
        return jax.vmap(function)(jnp.arange(num))
    return jax.lax.map(function, jnp.arange(num), batch_size=CHUNK)


def marginals(prior: Prior, sites: Sites, *, before: bool = False) -> tuple[Numbers, Numbers]:
    """Compute mean and variance of every point given the sites of its block.

    Args:
        prior: the prior.
        sites: the sites.
        before: take only the sites of points with smaller numbers.

    Exactness: exact for one block without a taper and Gaussian likelihoods; otherwise biased: what lies outside of the
        block is left out.
    """
    return over_points(lambda point: centre(prior, block(prior, sites, point, before=before), point), prior.mean.size)


def sweep(
    prior: Prior, sites: Sites, log_likelihood: LogLikelihood, informed: Bool[Array, " points"], damping: float
) -> Sites:
    """Choose all sites anew, once.

    Args:
        prior: the prior.
        sites: the sites so far.
        log_likelihood: log p(y_i | x_i) of every point.
        informed: which points have a likelihood; the sites of the others stay zero.
        damping: share of the new site; the rest stays.
    """
    mean, variance = marginals(prior, sites)
    return matched(sites, mean, variance, log_likelihood, informed, damping)


def matched(sites, mean, variance, log_likelihood, informed, damping):
    """Match the sites to the likelihoods, given the marginals."""
    cavity = jnp.maximum(1.0 / variance - sites.precision, LEAST_CAVITY / variance)
    centre = (mean / variance - sites.shift) / cavity
    tilted = tilt(log_likelihood, centre, 1.0 / cavity)
    precision = jnp.maximum(1.0 / tilted.variance - cavity, LEAST_PRECISION * cavity)
    shift = tilted.mean * (cavity + precision) - centre * cavity
    mixed = [(1.0 - damping) * old + damping * new for old, new in zip(sites, (precision, shift), strict=True)]
    return Sites(*(jnp.where(informed, value, 0.0) for value in mixed))


def propagate(
    prior: Prior,
    log_likelihood: LogLikelihood,
    informed: Bool[Array, " points"],
    *,
    num_sweeps: int = 2,
    damping: float = 0.8,
) -> Sites:
    """Find the sites. The first sweep starts from the prior's marginals, and is not damped.

    Exactness: exact for normal likelihoods of the points, after one sweep; otherwise to the accuracy of expectation
        propagation, which has no general bound.
    """
    none = jnp.zeros_like(prior.mean)
    sites = matched(Sites(none, none), prior.mean, prior.variance + prior.added, log_likelihood, informed, 1.0)
    again = lambda _, sites: sweep(prior, sites, log_likelihood, informed, damping)  # noqa: E731
    return jax.lax.fori_loop(0, num_sweeps - 1, again, sites)
