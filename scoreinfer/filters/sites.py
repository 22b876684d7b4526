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

from scoreinfer._quadrature import LogLikelihood, Numbers
from scoreinfer.filters.taper import Locality
from scoreinfer.score import LocalGaussianScore
from scoreinfer.score.sites import Sites, matched, roots_and_aims

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


class Block(NamedTuple):
    """The block of a point and the sites in it.

    Args:
        covariance: C on the block; the point comes first.
        root: T^(1/2).
        system: B = I + T^(1/2) C T^(1/2).
        aim: T^(-1/2) (nu - T m): how far from the prior mean the sites lie, in their standard deviations.
    """

    covariance: Float[Array, "block block"]
    root: Float[Array, " block"]
    system: Float[Array, "block block"]
    aim: Float[Array, " block"]


def block(prior: Prior, sites: Sites, point: Int[Array, ""], seen: Bool[Array, " block"] | bool = True) -> Block:
    """Gather the block of a point; sites that are not ``seen`` are left out."""
    index, covariance = prior.locality.index[point], prior.covariance(point)
    near = Sites(*(jnp.where(seen, value[index], 0.0) for value in sites))
    root, aim = roots_and_aims(near, prior.mean[index])
    system = jnp.eye(index.size, dtype=root.dtype) + root[:, None] * covariance * root
    return Block(covariance, root, system, aim)


def cavity(
    prior: Prior, sites: Sites, point: Int[Array, ""], *, before: bool = False
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute mean and variance of a point given the sites of its block, its own left out.

    They are m + c T^(1/2) B^(-1) T^(-1/2) (nu - T m) and C_00 - c T^(1/2) B^(-1) T^(1/2) c, with c the point's row of
    C. To take the point's own site out of its marginal instead would cancel all digits where the site is precise.
    """
    index = prior.locality.index[point]
    part = block(prior, sites, point, index < point if before else index != point)
    row, prior_variance = part.root * part.covariance[0], part.covariance[0, 0]
    solved = jax.scipy.linalg.solve(part.system, row, assume_a="pos")
    least = jnp.finfo(row.dtype).eps * prior_variance + jnp.finfo(row.dtype).tiny
    return prior.mean[point] + solved @ part.aim, jnp.maximum(prior_variance - solved @ row, least)


def marginal(prior: Prior, sites: Sites, point: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute mean and variance of a point given the sites of its block: its cavity times its own site."""
    mean, variance = cavity(prior, sites, point)
    precision, shift = sites.precision[point], sites.shift[point]
    aim = shift / jnp.where(precision > 0.0, precision, 1.0)
    left = 1.0 / (1.0 + variance * precision)
    return mean + variance * precision * left * (aim - mean), variance * left


def over_points(function: Callable, num: int):
    """Apply a function to the number of every point, many at once."""
    if num <= CHUNK:
        return jax.vmap(function)(jnp.arange(num))
    return jax.lax.map(function, jnp.arange(num), batch_size=CHUNK)


def cavities(prior: Prior, sites: Sites, *, before: bool = False) -> tuple[Numbers, Numbers]:
    """Compute mean and variance of every point given the sites of its block, its own left out.

    Args:
        prior: the prior.
        sites: the sites.
        before: take only the sites of points with smaller numbers.

    Exactness: as that of `marginals`.
    """
    return over_points(lambda point: cavity(prior, sites, point, before=before), prior.mean.size)


def marginals(prior: Prior, sites: Sites) -> tuple[Numbers, Numbers]:
    """Compute mean and variance of every point given the sites of its block.

    Args:
        prior: the prior.
        sites: the sites.

    Exactness: exact for one block without a taper and Gaussian likelihoods; otherwise biased: what lies outside of the
        block is left out.
    """
    return over_points(lambda point: marginal(prior, sites, point), prior.mean.size)


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
    new = matched(*cavities(prior, sites), log_likelihood, informed)
    return Sites(*((1.0 - damping) * old + damping * value for old, value in zip(sites, new, strict=True)))


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
    sites = matched(prior.mean, prior.variance + prior.added, log_likelihood, informed)
    again = lambda _, sites: sweep(prior, sites, log_likelihood, informed, damping)  # noqa: E731
    return jax.lax.fori_loop(0, num_sweeps - 1, again, sites)
