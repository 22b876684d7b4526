"""Steps of the reverse SDE as Gaussian kernels, and the prior that they make: the *discretised* learned prior.

With Gaussian x_0 given x_s, N(D, V), noise level s and the next level r < s, m = (r/s)^2, Bayes' rule gives

    x_r | x_s ~ N(m x_s + (1 - m) D, r^2 (1 - m) I + (1 - m)^2 V),        x_s ~ N(D, s^2 I + V) at the highest level,

the latter from D and V at x_s = 0. The law of x_0 after the last step, which ends at level zero, is the discretised
prior. It is a probability distribution for any score, and near the prior for a good one and enough steps.

References: Ho et al. 2020, arXiv 2006.11239, equation 7; Bao et al. 2022, arXiv 2201.06503 (optimal variance).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer._typing import Key, Sites
from scoreinfer.problem import Problem, Site
from scoreinfer.process import Noising
from scoreinfer.samplers.diffusion import log_normal
from scoreinfer.score import AbstractScore
from scoreinfer.score.base import Moments
from scoreinfer.score.guidance import moments_of
from scoreinfer.score.likelihood import AbstractLikelihood

State = Float[Array, " dim"]
Scalar = Float[Array, ""]
FLOOR = 1e-4
"""Least variance of x_0 given x_s, in units of s^2: a step never has a density without width. Chosen by judgement."""


class StepKernel(NamedTuple):
    """The Gaussian N(mean, F F^T).

    Args:
        mean: the mean.
        factor: F, lower triangular; or its diagonal alone.
    """

    mean: State
    factor: Float[Array, "dim dim"] | State

    def point(self, noise: State) -> State:
        """Compute mean + F noise."""
        return self.mean + (self.factor @ noise if self.factor.ndim == 2 else self.factor * noise)

    def noise(self, x: State) -> State:
        """Compute F^{-1} (x - mean)."""
        if self.factor.ndim == 1:
            return (x - self.mean) / self.factor
        return jax.scipy.linalg.solve_triangular(self.factor, x - self.mean, lower=True)

    def draw(self, key: Key) -> State:
        """Draw from the Gaussian."""
        return self.point(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def log_density(self, x: State) -> Scalar:
        """Compute the log density at ``x``."""
        diagonal = self.factor.diagonal() if self.factor.ndim == 2 else self.factor
        return log_normal(self.noise(x), 0.0, 1.0) - jnp.log(diagonal).sum()


def step_kernel(moments: Moments, x: State, level: Scalar, target: Scalar) -> StepKernel:
    """Make the kernel of x at level ``target`` given ``x`` at ``level``."""
    keep = (target / level) ** 2
    mean = keep * x + (1 - keep) * moments.mean
    return _kernel(mean, target**2 * (1 - keep) + (1 - keep) ** 2 * FLOOR * level**2, (1 - keep) ** 2, moments)


def start_kernel(moments: Moments, level: Scalar) -> StepKernel:
    """Make the law of x at the highest level from the moments of x_0 at x = 0."""
    return _kernel(moments.mean, level**2, jnp.ones_like(level), moments)


def _kernel(mean: State, isotropic: Scalar, share: Scalar, moments: Moments) -> StepKernel:
    """Make N(mean, isotropic I + share V)."""
    if moments.factor.ndim == 1:
        return StepKernel(mean, jnp.sqrt(isotropic + share * moments.variance))
    whole = isotropic * jnp.eye(mean.size, dtype=mean.dtype) + share * moments.covariance
    return StepKernel(mean, jnp.linalg.cholesky(whole))


def levels_of(process: Noising, num_steps: int) -> Float[Array, " levels"]:
    """Compute the levels of ``num_steps`` steps, from the highest to zero."""
    return jnp.append(process.levels(num_steps - 1)[::-1], 0.0)


class DiscretisedPrior(eqx.Module):
    """The discretised learned prior: x_0 as a function of standard normal noise, one vector for each kernel.

    Args:
        score: the score of the prior.
        process: the noising process, for its levels.
        num_steps: number of steps.
        dim: number of components of x.

    Exactness: it draws from itself exactly; from the prior it is consistent as num_steps -> infinity, for an exact
        score.
    """

    score: AbstractScore
    process: Noising
    num_steps: int = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the noise: one row for the start, and one for every step."""
        return self.num_steps + 1, self.dim

    def moments(self, level: Scalar, x: State, y: PyTree = None) -> Moments:
        """Compute mean and covariance of x_0 given x_s, a matrix for small states."""
        return moments_of(self.score, level, x, y)

    def path(self, noise: Float[Array, "kernels dim"], y: PyTree = None) -> Float[Array, "kernels dim"]:
        """Compute the states from the highest level to zero."""
        levels = levels_of(self.process, self.num_steps)
        first = start_kernel(self.moments(levels[0], jnp.zeros_like(noise[0]), y), levels[0]).point(noise[0])

        def step(x: State, inputs: tuple[Scalar, Scalar, State]) -> tuple[State, State]:
            level, target, noise = inputs
            new = step_kernel(self.moments(level, x, y), x, level, target).point(noise)
            return new, new

        rest = jax.lax.scan(step, first, (levels[:-1], levels[1:], noise[1:]))[1]
        return jnp.concatenate([first[None], rest])

    def draw(self, key: Key) -> State:
        """Draw one x_0."""
        return self.path(jax.random.normal(key, self.noise_shape))[-1]


def discretised_problem(
    prior: DiscretisedPrior,
    likelihood: AbstractLikelihood,
    site: Site,
    change: Callable[[State], State] = lambda x: x,
) -> Problem:
    """Make the problem whose unknowns are the noise of the discretised prior's kernels.

    Args:
        prior: the discretised prior.
        likelihood: the likelihood of x.
        site: name and shape of the site.
        change: from x to the flat site.

    Exactness: exact: the noise is standard normal, and x is a function of it.
    """

    def state(z: Float[Array, " noise"]) -> State:
        return prior.path(z.reshape(prior.noise_shape))[-1]

    def constrain(z: Float[Array, " noise"]) -> Sites:
        return {site.name: change(state(z)).reshape(site.shape)}

    def noise(sites: Sites) -> Float[Array, " noise"]:
        raise ValueError(f"Many paths of noise lead to one {site.name!r}: the noise of a given value is not defined.")

    def simulate(key: Key) -> tuple[Float[Array, " noise"], Sites]:
        return jax.random.normal(key, (prior.noise_shape[0] * prior.dim,)), {}

    return Problem(
        dim=prior.noise_shape[0] * prior.dim,
        latents=(site,),
        observed=(),
        log_prior=lambda z: log_normal(z, 0.0, 1.0),
        log_likelihood=lambda z, y: likelihood.log_density(state(z)),
        constrain=constrain,
        latent_sites=constrain,
        unconstrain=noise,
        simulate=simulate,
        simulate_observation=None,
        encode=lambda y: y,
        read=lambda args, kwargs: {},
    )
