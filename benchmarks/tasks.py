"""Six tasks of the sbibm benchmark as ordinary NumPyro models with exact densities.

Each model takes ``y`` (None to simulate) and has one latent site, ``theta``, a vector. Observations and reference
posterior draws come with the package sbibm-jax (Python 3.12 or newer), which is imported only when they are asked for;
the design of bernoulli_glm is made here as sbibm makes it.

References:
    Lueckmann, Boelts, Greenberg, Goncalves & Macke (2021), arXiv:2101.04653.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


class MoonNoise(dist.Distribution):
    """A crescent of radius Normal(0.1, 0.01) and angle Uniform(-pi/2, pi/2) about ``centre``.

    Exactness: the density is closed form, N(r; 0.1, 0.01) / (pi r) where r cos a > 0, up to radii below zero, whose
    probability is 1e-23.
    """

    arg_constraints: ClassVar = {"centre": constraints.real_vector}
    support = constraints.real_vector
    reparametrized_params: ClassVar = ["centre"]

    def __init__(self, centre, *, validate_args=None):
        self.centre = centre
        super().__init__(jnp.shape(centre)[:-1], jnp.shape(centre)[-1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        """Draw crescent points."""
        for_radius, for_angle = jax.random.split(key)
        shape = sample_shape + self.batch_shape
        radius = 0.1 + 0.01 * jax.random.normal(for_radius, shape)
        angle = jax.random.uniform(for_angle, shape, minval=-math.pi / 2, maxval=math.pi / 2)
        return self.centre + jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)

    def log_prob(self, value):
        """Compute the log density; minus infinity behind the crescent."""
        u, v = jnp.moveaxis(value - self.centre, -1, 0)
        radius = jnp.sqrt(jnp.maximum(u**2 + v**2, 1e-12))
        inside = dist.Normal(0.1, 0.01).log_prob(radius) - jnp.log(math.pi * radius)
        return jnp.where(u > 0.0, inside, -jnp.inf)


class LogisticSummary(dist.Distribution):
    """Sufficient statistics X'b of independent binary b with log odds X theta.

    Exactness: the density is exact in theta up to a factor that depends on the value alone (the number of binary
    series with these statistics), which is left out: posteriors are exact, evidences are not.
    """

    arg_constraints: ClassVar = {"theta": constraints.real_vector}
    support = constraints.real_vector
    pytree_data_fields = ("theta", "design")

    def __init__(self, theta, design, *, validate_args=None):
        self.theta, self.design = theta, design
        super().__init__(jnp.shape(theta)[:-1], jnp.shape(theta)[-1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        """Draw the binary series and reduce it."""
        logits = self.theta @ self.design.T
        spikes = dist.Bernoulli(logits=logits).sample(key, sample_shape)
        return spikes.astype(logits.dtype) @ self.design

    def log_prob(self, value):
        """Compute value . theta - sum log(1 + exp(X theta))."""
        return (value * self.theta).sum(-1) - jax.nn.softplus(self.theta @ self.design.T).sum(-1)


def _uniform(bound: float, dim: int) -> dist.Distribution:
    return dist.Uniform(-bound, bound).expand([dim]).to_event(1)


def two_moons(y=None):
    """Two crescents, mirror images."""
    theta = numpyro.sample("theta", _uniform(1.0, 2))
    shift = jnp.stack([-jnp.abs(theta[0] + theta[1]), theta[1] - theta[0]]) / math.sqrt(2.0)
    numpyro.sample("y", MoonNoise(shift + jnp.array([0.25, 0.0])), obs=y)


def gaussian_linear(y=None):
    """Gaussian mean under a Gaussian prior, both of variance 0.1, in ten dimensions."""
    theta = numpyro.sample("theta", dist.Normal(0.0, math.sqrt(0.1)).expand([10]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, math.sqrt(0.1)).to_event(1), obs=y)


def gaussian_linear_uniform(y=None):
    """Gaussian mean under a uniform prior in ten dimensions."""
    theta = numpyro.sample("theta", _uniform(1.0, 10))
    numpyro.sample("y", dist.Normal(theta, math.sqrt(0.1)).to_event(1), obs=y)


def gaussian_mixture(y=None):
    """Common mean of two Gaussians, one ten times narrower."""
    theta = numpyro.sample("theta", _uniform(10.0, 2))
    scales = jnp.array([[1.0, 1.0], [0.1, 0.1]])
    components = dist.Normal(jnp.broadcast_to(theta, (2, 2)), scales).to_event(1)
    numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.5, 0.5])), components), obs=y)


@lru_cache
def glm_design() -> np.ndarray:
    """Make the design matrix: a constant and the nine latest values of a white-noise stimulus, one row a time."""
    stimulus = np.random.RandomState(42).randn(100).astype(np.float32)
    lagged = [np.concatenate([np.zeros(lag, np.float32), stimulus[: 100 - lag]]) for lag in range(9)]
    return np.stack([np.ones(100, np.float32), *lagged], axis=1)


@lru_cache
def glm_precision() -> np.ndarray:
    """Make the prior precision: variance two for the constant, second differences for the filter."""
    differences = np.eye(9) - np.eye(9, k=-1)
    smooth = differences @ differences + np.diag(np.arange(9) / 9) ** 0.5
    precision = np.zeros((10, 10))
    precision[0, 0] = 0.5
    precision[1:, 1:] = smooth.T @ smooth
    return precision


def bernoulli_glm(y=None):
    """Binary series driven through a smooth filter, seen through its ten sufficient statistics."""
    scale_tril = np.linalg.cholesky(np.linalg.inv(glm_precision()))
    theta = numpyro.sample("theta", dist.MultivariateNormal(jnp.zeros(10), scale_tril=jnp.asarray(scale_tril)))
    numpyro.sample("y", LogisticSummary(theta, jnp.asarray(glm_design())), obs=y)


def bernoulli_glm_raw(y=None):
    """The same with the series of 100 binaries itself as the observation."""
    scale_tril = np.linalg.cholesky(np.linalg.inv(glm_precision()))
    theta = numpyro.sample("theta", dist.MultivariateNormal(jnp.zeros(10), scale_tril=jnp.asarray(scale_tril)))
    numpyro.sample("y", dist.Bernoulli(logits=jnp.asarray(glm_design()) @ theta).to_event(1), obs=y)


def slcp(y=None):
    """Simple likelihood, complex posterior: four draws of a bivariate normal; signs of two scales are not identified.

    The covariance is sbibm's, ((s1^2 + e, r s1 s2), (r s1 s2, s2^2 + e)) with s1 = theta3^2, s2 = theta4^2,
    r = tanh theta5 and e = 1e-6; its Cholesky factor is written without cancellation.
    """
    theta = numpyro.sample("theta", _uniform(3.0, 5))
    first, second, correlation, jitter = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4]), 1e-6
    top = jnp.sqrt(first**2 + jitter)
    unexplained = jnp.cosh(theta[4]) ** -2 + correlation**2 * jitter / top**2
    bottom = jnp.sqrt(second**2 * unexplained + jitter)
    scale_tril = jnp.stack([jnp.stack([top, 0.0 * top]), jnp.stack([correlation * first * second / top, bottom])])
    with numpyro.plate("draws", 4):
        numpyro.sample("y", dist.MultivariateNormal(theta[:2], scale_tril=scale_tril), obs=y)


class Task(NamedTuple):
    """One task of the benchmark.

    Args:
        name: its name in sbibm.
        model: NumPyro model with latent site ``theta`` and observed site ``y``.
        shape: shape of one observation.
    """

    name: str
    model: Callable
    shape: tuple[int, ...]

    def observation(self, number: int) -> np.ndarray:
        """Load observation ``number`` (from 1)."""
        return np.asarray(_sbibm(self.name).get_observation(number)).reshape(self.shape)

    def reference(self, number: int) -> np.ndarray:
        """Load the 10,000 reference posterior draws of observation ``number``, one a row."""
        return np.asarray(_sbibm(self.name).get_reference_posterior_samples(number))


@lru_cache
def _sbibm(name: str):
    try:
        import sbibm_jax
    except ImportError as error:
        raise ImportError("Observations and reference draws need sbibm-jax (Python 3.12 or newer).") from error
    return sbibm_jax.get_task(name)


TASKS = (
    Task("two_moons", two_moons, (2,)),
    Task("gaussian_linear", gaussian_linear, (10,)),
    Task("gaussian_linear_uniform", gaussian_linear_uniform, (10,)),
    Task("gaussian_mixture", gaussian_mixture, (2,)),
    Task("bernoulli_glm", bernoulli_glm, (10,)),
    Task("slcp", slcp, (4, 2)),
)
"""The tasks, in the order in which results are printed."""
