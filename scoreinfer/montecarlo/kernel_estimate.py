"""A kernel estimate: a density fitted to draws, which can be drawn from and evaluated.

With n draws z_i, m_i and C_i the mean and covariance of the draws nearest to z_i, and h the width of the kernels,

    q(z) = (1 - s) (1 / n) sum_i t(z; m_i + sqrt(1 - h^2) (z_i - m_i), h^2 C_i) + s t(z; m, (1.5)^2 C).

The centres are drawn in towards the means, so that the estimate is no wider than the draws are. The last term, with
mean and covariance of all draws, is wider: it bounds importance weights where there are no draws.

References: West 1993, JRSS B 55(2) (centres drawn in).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer.montecarlo.reference import AbstractReference, Overdispersed

DEGREES = 5.0
"""Degrees of freedom of the kernels. Chosen by judgement: tails heavy enough to bound the weights, with a variance."""
MAX_KERNELS = 256
"""Kernels at most, as each costs a matrix solve in every evaluation. Chosen by judgement."""
WIDE_SHARE, WIDENING = 0.15, 1.5
"""Share s of the wide distribution, and how much wider than all draws it is. Chosen by judgement."""


class KernelEstimate(AbstractReference):
    """A mixture of multivariate t distributions.

    Args:
        centres: their centres.
        factors: Cholesky factors of their scales.
        log_shares: logarithms of their shares.
    """

    centres: Float[Array, "kernels dim"]
    factors: Float[Array, "kernels dim dim"]
    log_shares: Float[Array, " kernels"]

    def sample(self, key):
        """Draw one z."""
        for_kernel, for_draw = jax.random.split(key)
        kernel = jax.random.categorical(for_kernel, self.log_shares)
        return self.centres[kernel] + self.factors[kernel] @ self._standard.sample(for_draw)

    def log_density(self, z):
        """Compute the log density of z."""

        def one(centre, factor):
            u = jax.scipy.linalg.solve_triangular(factor, z - centre, lower=True)
            return self._standard.log_density(u) - jnp.log(jnp.diag(factor)).sum()

        return jax.nn.logsumexp(self.log_shares + jax.vmap(one)(self.centres, self.factors))

    @property
    def _standard(self) -> Overdispersed:
        zeros = jnp.zeros_like(self.centres[0])
        return Overdispersed(zeros, zeros + 1.0, np.array(DEGREES))


def kernel_estimate(values: Float[Array | np.ndarray, "num dim"]) -> KernelEstimate:
    """Fit kernels to draws, to at most 256 of them.

    Exactness: a normalised density whatever the draws are.
    """
    z = np.asarray(values, np.float64)[:: -(-len(values) // MAX_KERNELS)]
    num, dim = z.shape
    num_near = min(num, max(10 * dim, 32))
    scale = z.std(axis=0) + 1e-6 * (1.0 + np.abs(z).max(axis=0))
    distance = np.linalg.norm((z[:, None] - z) / scale, axis=-1)
    mean, covariance = _moments(z[np.argsort(distance, axis=1)[:, :num_near]], scale)
    width = num_near ** (-1 / (dim + 4))
    own = mean + np.sqrt(1 - width**2) * (z - mean), width * np.linalg.cholesky(covariance)
    mean, covariance = _moments(z[None], scale)
    centres, factors = map(np.concatenate, zip(own, (mean, WIDENING * np.linalg.cholesky(covariance)), strict=True))
    to_scale = np.sqrt((DEGREES - 2) / DEGREES)  # from the standard deviation of a t distribution to its scale
    shares = np.append(np.full(num, (1 - WIDE_SHARE) / num), WIDE_SHARE)
    return KernelEstimate(*(jnp.asarray(part, float) for part in (centres, to_scale * factors, np.log(shares))))


def _moments(
    groups: Float[np.ndarray, "groups num dim"], scale: Float[np.ndarray, " dim"]
) -> tuple[Float[np.ndarray, "groups dim"], Float[np.ndarray, "groups dim dim"]]:
    """Compute means and covariances of groups of draws.

    The covariance of few draws is mixed with its diagonal, so that it can be factored.
    """
    _, num, dim = groups.shape
    mean = groups.mean(axis=1)
    centred = groups - mean[:, None]
    covariance = np.einsum("gni,gnj->gij", centred, centred) / num
    trust = num / (num + dim)
    diagonal = (1 - trust) * np.einsum("gii->gi", covariance) + (1e-3 * scale) ** 2
    return mean, trust * covariance + np.eye(dim) * diagonal[:, None, :]
