"""References: densities where populations of particles start. They are normalised, and can be drawn from."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices, run_once
from scoreinfer._typing import Key
from scoreinfer.agreement import misdrawn_latents
from scoreinfer.problem import Problem

NUM_LOCATED = 4096
"""Draws that locate a prior whose density does not describe its draws: mean and scale to two per cent."""


class AbstractReference(eqx.Module):
    """Where the particles start: a normalised density that can be drawn from."""

    @property
    def is_prior(self) -> bool:
        """Tell whether it is the prior."""
        return False

    @abc.abstractmethod
    def sample(self, key: Key) -> Float[Array, " dim"]:
        """Draw one z."""

    @abc.abstractmethod
    def log_density(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the log density of z."""


class Prior(AbstractReference):
    """The prior of a problem that can be simulated."""

    problem: Problem = eqx.field(static=True)

    @property
    def is_prior(self):
        """Return True."""
        return True

    def sample(self, key):
        """Draw from the prior."""
        assert self.problem.simulate is not None
        return self.problem.simulate(key)[0]

    def log_density(self, z):
        """Compute the log prior."""
        return self.problem.log_prior(z)


class Overdispersed(AbstractReference):
    """A wide multivariate t distribution, where there is no prior to draw from or another start is wanted.

    Its tails are heavy, for targets whose tails are heavy too. Particles from a Gaussian would have to walk out to
    them.

    Args:
        centre: its centre.
        scale: its scale in every dimension.
        degrees: degrees of freedom.
    """

    centre: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    degrees: Float[Array | np.ndarray, ""] = eqx.field(default_factory=lambda: np.array(3.0))

    def sample(self, key):
        """Draw from the t distribution."""
        for_radius, for_direction = jax.random.split(key)
        chi_squared = 2 * jax.random.gamma(for_radius, self.degrees / 2, (), self.scale.dtype)
        normal = jax.random.normal(for_direction, self.scale.shape, self.scale.dtype)
        return self.centre + self.scale * normal * jnp.sqrt(self.degrees / chi_squared)

    def log_density(self, z):
        """Compute its log density."""
        dim, degrees = self.scale.size, self.degrees
        square = (((z - self.centre) / self.scale) ** 2).sum()
        constant = gammaln((degrees + dim) / 2) - gammaln(degrees / 2) - 0.5 * dim * jnp.log(degrees * jnp.pi)
        return constant - jnp.log(self.scale).sum() - 0.5 * (degrees + dim) * jnp.log1p(square / degrees)


class Start(AbstractReference):
    """The prior or a t distribution: one program serves explorers that start from either.

    Args:
        prior: the prior.
        other: the t distribution.
        is_other: whether it takes the prior's place.
    """

    prior: Prior
    other: Overdispersed
    is_other: Bool[Array | np.ndarray, ""]

    @property
    def is_prior(self):
        """Tell whether it is the prior."""
        return not self.is_other

    def sample(self, key):
        """Draw from the one that it is."""
        dtype = self.other.centre.dtype
        return jax.lax.cond(
            self.is_other, lambda key: self.other.sample(key), lambda key: self.prior.sample(key).astype(dtype), key
        )

    def log_density(self, z):
        """Compute the log density of the one that it is."""
        dtype = self.other.centre.dtype
        return jax.lax.cond(
            self.is_other,
            lambda z: self.other.log_density(z).astype(dtype),
            lambda z: self.prior.log_density(z).astype(dtype),
            z,
        )


def overdispersed(
    start: AbstractReference, centre: Float[np.ndarray, " dim"], scale: Float[np.ndarray, " dim"], degrees: float
) -> AbstractReference:
    """Make a t distribution that shares its programs with a start (`start_of`)."""
    other = Overdispersed(jnp.asarray(centre), jnp.asarray(scale), np.array(degrees))
    return Start(start.prior, other, np.array(True)) if isinstance(start, Start) else other


@run_once
def reference_draws(key: Key, density: AbstractReference, num: int) -> Float[Array, "num dim"]:
    """Draw ``num`` times from a density."""
    return jax.vmap(density.sample)(jax.random.split(key, num))


@over_devices
def reference_rows(key: Key, density: AbstractReference, rows: Int[Array, " num"]) -> Float[Array, "num dim"]:
    """Draw some rows of an endless list of draws; row i depends on ``key`` and i alone."""
    return map_rows(lambda row: density.sample(jax.random.fold_in(key, row)), None)(rows)


def reference_of(problem: Problem, scale: float = 5.0) -> AbstractReference:
    """Choose where first draws come from.

    It is the prior, where it can be drawn from and its density describes its draws. Where the density does not, it is a
    t distribution fitted to 4096 draws, twice as wide. Where there are no draws, it is a t distribution around zero.

    Args:
        problem: the problem.
        scale: scale of the t distribution around zero.
    """
    if problem.simulate is None:
        return _around_zero(problem.dim, scale)
    if not misdrawn_latents(problem):
        return Prior(problem)
    drawn = reference_rows(jax.random.key(0), Prior(problem), jnp.arange(NUM_LOCATED))
    return Overdispersed(drawn.mean(axis=0), 2.0 * drawn.std(axis=0))


def start_of(problem: Problem, scale: float = 5.0) -> AbstractReference:
    """Choose where explorers start: from `reference_of`, with the prior as a `Start`."""
    reference = reference_of(problem, scale)
    if not isinstance(reference, Prior):
        return reference
    return Start(reference, _around_zero(problem.dim, 1.0), np.array(False))


def _around_zero(dim: int, scale: float) -> Overdispersed:
    ones = np.ones(dim, jnp.result_type(float))
    return Overdispersed(jnp.asarray(0 * ones), jnp.asarray(scale * ones))
