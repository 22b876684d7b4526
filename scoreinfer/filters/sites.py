"""Points with a sample prior and scalar likelihoods: the posterior near each of them by expectation propagation.

The prior of the points is that of the N members' anomalies A, and of noise of variance b that is added to every point
by itself:

    x_j = m_j + A_j^T w / sqrt(N - 1) + e_j,        w ~ N(0, I), e_j ~ N(0, b_j).

Each likelihood p(y_j | x_j) is replaced by a *site*, an unnormalised Gaussian exp(nu_j x_j - tau_j x_j^2 / 2).
Expectation propagation takes site i away, which leaves the cavity N(x_i; m_i', v_i'), tilts it by the exact likelihood,
and chooses the site anew so that mean and variance agree:

    tau_i = 1 / v_tilted - 1 / v',        nu_i = m_tilted / v_tilted - m' / v'.

For a normal likelihood of x_i the site is the likelihood, whatever the cavity. All points are moved at once.

*Localisation*: seen from point i, a site j tells of w with precision t_j = rho_ij tau_j / (1 + tau_j b_j), where rho_ij
is the taper of the distance between the two. So every point has its own posterior of w, with precision

    M_i = I + S T S^T,        S = A / sqrt(N - 1), T = diag(t),

which is a matrix of N rows, or, where the block of i has n < N points, one of n rows: B_i = I + T^(1/2) S^T S T^(1/2).

References: Minka 2001, UAI (expectation propagation); Hunt, Kostelich and Szunyogh 2007, Physica D 230, section 2.3
(precisions tapered by distance).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._quadrature import LogLikelihood, Numbers
from scoreinfer.filters.spectral import left_of
from scoreinfer.filters.taper import Locality
from scoreinfer.score import LocalGaussianScore
from scoreinfer.score.sites import Sites, matched, roots_and_aims

CHUNK = 4096
"""Blocks computed at once: memory grows with this number, not with the state."""


class Prior(eqx.Module):
    """The prior of the points.

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
        """Compute the tapered covariance on the block of a point; zero where the block is padded."""
        index, present = self.locality.index[point], self.locality.present[point]
        part = self.anomalies[:, index]
        sample = part.T @ part / (self.anomalies.shape[0] - 1)
        tapered = self.locality.taper(index[:, None], index) * sample + jnp.diag(self.added[index])
        return jnp.where(present[:, None] & present, tapered, 0.0)

    def score(self) -> LocalGaussianScore:
        """Make the score that a diffusion filter would follow from a prior with tapered covariances."""
        blocks = over_points(self.covariance, self.mean.size)
        return LocalGaussianScore(self.mean, self.locality.index, blocks)


class Block(NamedTuple):
    """What the sites near a point tell of w.

    Args:
        own: the point's own column of S.
        small: S T^(1/2).
        aim: T^(1/2) (nu / tau - m): how far from the prior mean the sites lie, in their standard deviations.
    """

    own: Float[Array, " num"]
    small: Float[Array, "num block"]
    aim: Float[Array, " block"]


def block(prior: Prior, sites: Sites, point: Int[Array, ""], seen: Bool[Array, " block"] | bool = True) -> Block:
    """Gather the block of a point; sites that are not ``seen`` are left out."""
    index, present = prior.locality.index[point], prior.locality.present[point]
    columns = prior.anomalies[:, index] / jnp.sqrt(prior.anomalies.shape[0] - 1.0)
    near = Sites(*(jnp.where(seen & present, value[index], 0.0) for value in sites))
    root, aim = roots_and_aims(near, prior.mean[index])
    share = jnp.sqrt(prior.locality.taper(point, index)) / jnp.sqrt(1.0 + near.precision * prior.added[index])
    return Block(columns[:, 0], columns * (share * root), share * aim)


def cavity(
    prior: Prior, sites: Sites, point: Int[Array, ""], *, before: bool = False
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute mean and variance of a point given the sites of its block, its own left out.

    With s the point's own column of S, they are m + s^T M^(-1) S T^(1/2) aim and s^T M^(-1) s + b. To take the point's
    own site out of its marginal instead would cancel all digits where the site is precise.
    """
    index = prior.locality.index[point]
    part = block(prior, sites, point, index < point if before else index != point)
    weight, left = left_of(part.small, part.own)
    least = jnp.finfo(left.dtype).eps * part.own @ part.own + jnp.finfo(left.dtype).tiny
    return prior.mean[point] + weight @ part.aim, jnp.maximum(left, least) + prior.added[point]


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
        block is left out, and what is far away counts less.
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
