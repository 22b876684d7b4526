"""Stand-ins for a trained posterior, small enough to run everywhere, and the model they answer for."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.stats import norm

from scoreinfer.model import from_numpyro
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractDensityProposal
from scoreinfer.samplers.single import Evidence, Learned, Round, Taught

Y1 = np.array([0.3, 1.9, -0.4, 1.1, 0.8], np.float32)
Y2 = np.array([-1.2, -2.0, -0.3, -1.1, -2.6], np.float32)


def location_scale(y=None):
    """A skewed posterior in two dimensions; ``sigma`` is positive and ``log_sigma`` deterministic."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.Gamma(2.0, 1.0))
    numpyro.deterministic("log_sigma", jnp.log(sigma))
    with numpyro.plate("n", 5):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def grid_moments(y):
    """Posterior mean and standard deviation of mu and log sigma by quadrature, NumPy alone."""
    mu, log_sigma = np.meshgrid(np.linspace(-9, 9, 1201), np.linspace(-5, 4, 901), indexing="ij")
    sigma = np.exp(log_sigma)
    log_p = -0.5 * (mu / 2) ** 2 + 2 * log_sigma - sigma  # Gamma(2, 1) with the Jacobian of log
    log_p += sum(-0.5 * ((value - mu) / sigma) ** 2 - log_sigma for value in np.asarray(y, np.float64))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    moments = {}
    for name, x in {"mu": mu, "log_sigma": log_sigma}.items():
        mean = (p * x).sum()
        moments[name] = mean, np.sqrt((p * (x - mean) ** 2).sum())
    return moments


def as_learned(proposal, y):
    """Wrap a proposal as what `learn` returns after no training."""
    evidence = Evidence(y, np.zeros((1, 1)), 0.0, 0, 1.0)
    return Learned(proposal, evidence, Taught((Round(proposal, 0, 1.0, 0.0, 0.0, 0.0, 0.1),), "good enough", 0))


class GaussianProposal(AbstractDensityProposal):
    """Normal around the data's own mean and log standard deviation, deliberately off: moved by ``shift``.

    With ``path`` the draw is reached through one noisy value u: u is drawn first, then z given u; r(u | z) is
    a noising that is not the exact conditional, so weights vary over paths.
    """

    shift: jax.Array
    scale: jax.Array
    problem: Problem = eqx.field(static=True)
    path: bool = eqx.field(static=True, default=False)

    @property
    def proposal(self):
        return self

    @property
    def outliers(self):
        return None

    def context(self, target):
        y = target.y
        if not y:
            return self.shift
        return jnp.stack([y["y"].mean(), jnp.log(y["y"].std())]) + self.shift

    def _log_ratio(self, context, u, z):
        log_q = norm.logpdf(u, context, self.scale) + norm.logpdf(z, 0.5 * (context + u), self.scale)
        return (log_q - norm.logpdf(u, 0.5 * (z + context), 1.2 * self.scale)).sum()

    def propose(self, key, context):
        key_u, key_z = jax.random.split(key)
        u = context + self.scale * jax.random.normal(key_u, context.shape)
        centre = 0.5 * (context + u) if self.path else context
        z = centre + self.scale * jax.random.normal(key_z, u.shape)
        return z, self._log_ratio(context, u, z) if self.path else self.log_q(None, context, z)

    def log_q(self, key, context, z):
        if not self.path:
            return norm.logpdf(z, context, self.scale).sum()
        u = 0.5 * (z + context) + 1.2 * self.scale * jax.random.normal(key, z.shape)
        return self._log_ratio(context, u, z)


@functools.cache
def location_scale_problem():
    return from_numpyro(location_scale)


def fake_posterior(problem=None, *, path=False, shift=0.3, scale=0.6):
    """Make the double; it is its own ``posterior.proposal``."""
    problem = location_scale_problem() if problem is None else problem
    return GaussianProposal(jnp.full(problem.dim, shift), jnp.full(problem.dim, scale), problem, path)
