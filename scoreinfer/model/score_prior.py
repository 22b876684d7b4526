"""Learned priors as NumPyro sites."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.handlers import reparam
from numpyro.infer.reparam import TransformReparam


@runtime_checkable
class Prior(Protocol):
    """What a site needs of a learned prior (`scoreinfer.samplers.learned_prior.LearnedPrior`)."""

    shape: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Number of components."""

    def forward(self, noise: Any) -> Any:
        """Compute x, flat, from standard normal noise."""

    def inverse(self, x: Any) -> Any:
        """Compute the noise behind x, and the log density of x."""


class FlowTransform(Transform):
    """The map from noise to a draw of a learned prior, as NumPyro's transform."""

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, prior: Prior) -> None:
        self.prior = prior

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Compute draws from noise."""
        return jnp.vectorize(self.prior.forward, signature="(d)->(d)")(x)

    def _inverse(self, y: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self._inverted(y)[0]

    def log_abs_det_jacobian(
        self, x: Float[Array, "*batch dim"], y: Float[Array, "*batch dim"], intermediates: None = None
    ) -> Float[Array, "*batch"]:
        """Compute the log determinant from the density of ``y``."""
        log_noise = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
        return log_noise - self._inverted(y)[1]

    def _inverted(self, y: Float[Array, "*batch dim"]) -> tuple[Array, Array]:
        return jnp.vectorize(self.prior.inverse, signature="(d)->(d),()")(y)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Say what NumPyro may trace."""
        return (self.prior,), (("prior",), {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowTransform) and self.prior is other.prior


class ScorePrior(dist.TransformedDistribution):
    """A learned prior as a NumPyro distribution.

    Args:
        prior: the learned prior, as `scoreinfer.fit_score` returns it.

    Exactness: ``sample`` and ``log_prob`` are exact for the flow of the prior. ``log_prob`` inverts the flow
        numerically, which has no gradient: for NUTS and other gradient kernels use `score_prior`.

    Raises:
        ValueError: by ``log_prob``, if the prior has more than 32 components.
    """

    def __init__(self, prior: Prior, *, validate_args: bool | None = None) -> None:
        noise = dist.Normal(jnp.zeros(prior.dim), 1.0).to_event(1)
        shape = [] if prior.shape == (prior.dim,) else [dist.transforms.ReshapeTransform(prior.shape, (prior.dim,))]
        super().__init__(noise, [FlowTransform(prior), *shape], validate_args=validate_args)


def score_prior(name: str, prior: Prior) -> Float[Array, "*shape"]:
    """Sample a site from a learned prior, inside a NumPyro model.

    The latent site is the noise ``<name>_base``, standard normal; the value is the deterministic site ``name``. Any
    kernel of NumPyro therefore works, with gradients through the flow.

    Args:
        name: name of the site.
        prior: the learned prior, as `scoreinfer.fit_score` returns it.

    Exactness: exact for the flow of the prior.

    >>> from scoreinfer.samplers.learned_prior import as_prior
    >>> from scoreinfer.score import GaussianScore
    >>> prior = as_prior(GaussianScore(jnp.zeros(2), jnp.eye(2)), (2,))
    >>> with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as played:
    ...     x = score_prior("x", prior)
    >>> [(site, row["type"]) for site, row in played.items()]
    [('x_base', 'sample'), ('x', 'deterministic')]
    """
    with jax.numpy_rank_promotion("allow"), reparam(config={name: TransformReparam()}):
        return numpyro.sample(name, ScorePrior(prior))
