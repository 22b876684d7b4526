"""Likelihoods of x, in the form that guidance needs: what an observation sees of x, and how it moves a Gaussian.

An observation sees x through its predictors u = predict(x). Around the mean m of u it is taken for

    log p(y | u) = c + f (u - m) - (u - m) R R^T (u - m) / 2,

where c, f and R (`Pull`) are exact for a Gaussian likelihood, come from expectation propagation for other likelihoods
that factor over the predictors, and from Laplace's method for any density r(x). With x ~ N(m_x, F F^T), A = du/dx and
B = I + F^T A^T R R^T A F,

    Cov[x | y] = F B^{-1} F^T,    E[x | y] = m_x + Cov[x | y] A^T f,    log p(y) = c + f A Cov[x | y] A^T f / 2
                                                                                   - log |B| / 2.

References: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", sections 3.4 and 3.6.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.process.base import LOG_2PI
from scoreinfer.score.base import Moments, positive_root
from scoreinfer.score.sites import log_product, propagate_expectations

State = Float[Array, " dim"]
Predictors = Float[Array, " obs"]
Scalar = Float[Array, ""]
SHARES = (1.0, 0.8, 0.8, 0.8)
"""Shares of the way of the updates of expectation propagation. Chosen by judgement: linear Gaussian sites are right
after one whole update, others change little after two."""


class Pull(NamedTuple):
    """What an observation does to a Gaussian (see the module).

    Args:
        force: f.
        root: R, or its diagonal alone.
        log_factor: c.
    """

    force: Predictors
    root: Float[Array, "obs obs"] | Predictors
    log_factor: Scalar

    def condition(self, prior: Moments, rows: Float[Array, "obs dim"]) -> tuple[Moments, Scalar]:
        """Compute the moments of x given y, and log p(y); ``rows`` is A, and the prior's factor a matrix."""
        seen = (self.root[:, None] * rows if self.root.ndim == 1 else self.root.T @ rows) @ prior.factor
        inner = jnp.linalg.cholesky(jnp.eye(prior.mean.size, dtype=prior.mean.dtype) + seen.T @ seen)
        factor = jax.scipy.linalg.solve_triangular(inner, prior.factor.T, lower=True).T
        unit = factor.T @ (rows.T @ self.force)
        log_evidence = self.log_factor + 0.5 * unit @ unit - jnp.log(inner.diagonal()).sum()
        return Moments(prior.mean + factor @ unit, factor), log_evidence


class AbstractLikelihood(eqx.Module):
    """The likelihood of one observation as a function of x."""

    predict: eqx.AbstractVar[Callable[[State], Predictors]]
    """Maps x to the predictors u."""

    @abc.abstractmethod
    def log_of_predictors(self, u: Predictors) -> Scalar:
        """Compute log p(y | x) from the predictors of x."""

    @abc.abstractmethod
    def pull(self, mean: Predictors, factor: Float[Array, "obs dim"]) -> Pull:
        """Compute what the observation does to u ~ N(mean, G G^T), G = ``factor``."""

    def log_density(self, x: State) -> Scalar:
        """Compute log p(y | x)."""
        return self.log_of_predictors(self.predict(x))

    def through(self, change: Callable[[State], State]) -> "AbstractLikelihood":
        """Rewrite the likelihood for v, where x = change(v)."""
        return eqx.tree_at(lambda tree: tree.predict, self, Composed(self.predict, change))


class Composed(eqx.Module):
    """The function v -> outer(inner(v))."""

    outer: Callable
    inner: Callable

    def __call__(self, v: State) -> Float[Array, "..."]:
        """Compute outer(inner(v))."""
        return self.outer(self.inner(v))


class GaussianLikelihood(AbstractLikelihood):
    """y = predict(x) + scale e, e ~ N(0, I).

    Exactness: `pull` is exact.

    >>> seen = GaussianLikelihood(lambda x: x[:1], jnp.array([2.0]), jnp.array([0.5]))
    >>> pull = seen.pull(jnp.zeros(1), jnp.ones((1, 1)))
    >>> float(pull.force[0]), float(pull.root[0])  # 2 / 0.25, 1 / 0.5
    (8.0, 2.0)
    """

    predict: Callable[[State], Predictors]
    y: Predictors
    scale: Predictors

    def log_of_predictors(self, u):
        """Compute log N(y; u, diag scale^2)."""
        unit = (self.y - u) / self.scale
        return -0.5 * (unit**2 + LOG_2PI).sum() - jnp.log(self.scale).sum()

    def pull(self, mean, factor):
        """Compute the gradient (y - mean) / scale^2 and the root 1 / scale."""
        return Pull((self.y - mean) / self.scale**2, 1 / self.scale, self.log_of_predictors(mean))


class SiteLikelihood(AbstractLikelihood):
    """p(y | x) = prod_i g_i(u_i): counts, binary data, a known non-linear function of one component.

    Args:
        predict: maps x to the predictors u.
        log_sites: computes log g_i(u_i) of all predictors at once.

    Exactness: biased: `pull` is expectation propagation, whose Gaussian has the moments of the posterior of u to a
        good approximation. `log_of_predictors` is exact.
    """

    predict: Callable[[State], Predictors]
    log_sites: Callable[[Predictors], Predictors]

    def log_of_predictors(self, u):
        """Compute sum_i log g_i(u_i)."""
        return self.log_sites(u).sum()

    def pull(self, mean, factor):
        """Compute the gradient and curvature of the Gaussian sites exp(nu u - tau u^2 / 2) that stand for the g_i."""
        covariance = factor @ factor.T
        sites = propagate_expectations(mean, covariance, self.log_sites, True, SHARES)
        log_factor = log_product(mean, covariance, self.log_sites, sites)
        return Pull(sites.shift - sites.precision * mean, jnp.sqrt(sites.precision), log_factor)


class DensityLikelihood(AbstractLikelihood):
    """Any positive function r(u) of the predictors; of x itself, where ``predict`` returns x.

    Sohl-Dickstein et al. 2015, arXiv 1503.03585, section 2.5, multiply a diffusion model by such an r.

    Args:
        predict: maps x to the predictors u.
        log_ratio: computes log r(u).

    Exactness: biased: `pull` is one step of Laplace's method from the mean. It is exact where log r is quadratic and
        concave. `log_of_predictors` is exact.
    """

    predict: Callable[[State], Predictors]
    log_ratio: Callable[[Predictors], Scalar]

    def log_of_predictors(self, u):
        """Compute log r(u)."""
        return self.log_ratio(u)

    def pull(self, mean, factor):
        """Compute gradient and curvature of log r at the mean; a direction that curves upwards counts as flat."""
        curvature = positive_root(-jax.hessian(self.log_ratio)(mean))
        return Pull(jax.grad(self.log_ratio)(mean), curvature, self.log_ratio(mean))
