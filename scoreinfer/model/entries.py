"""The entries of a distribution: independent numbers, each with its own law and its own parameter."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool
from numpyro.distributions import biject_to

TRUNCATED = (
    dist.LeftTruncatedDistribution,
    dist.RightTruncatedDistribution,
    dist.TwoSidedTruncatedDistribution,
)
"""Their first argument is the distribution that they truncate."""


def bare(fn: dist.Distribution) -> dist.Distribution:
    """Take away what only groups or masks the entries: ``to_event`` and ``mask``.

    >>> bare(dist.Normal(jnp.zeros(3), 1.0).to_event(1)).batch_shape
    (3,)
    """
    if isinstance(fn, dist.Independent | dist.MaskedDistribution):
        return bare(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = bare(fn.base_dist)
        return inner if inner.event_shape else inner.expand(fn.shape())
    return fn


def mask_of(fn: dist.Distribution) -> Bool[Array, "..."]:
    """Compute which entries count."""
    shape, mask = fn.shape(), jnp.ones(fn.shape(), bool)
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            own = jnp.asarray(fn._mask, bool)
            mask &= jnp.broadcast_to(own.reshape(own.shape + (1,) * fn.event_dim), shape)
        fn = fn.base_dist
    return mask


def parameters(fn: dist.Distribution) -> dict[str, Array]:
    """List the parameters of a bare distribution, each of the shape of its entries.

    Returns:
        Nothing, where a parameter is not one number for each entry.

    >>> sorted(parameters(dist.Normal(jnp.zeros(2), 1.0)))
    ['loc', 'scale']
    """
    shape, own = fn.shape(), _own(fn)
    try:
        return {name: jnp.broadcast_to(value, shape) for name, value in own.items()}
    except ValueError:
        return {}


def with_parameter(fn: dist.Distribution, name: str, value: Array) -> dist.Distribution:
    """Make the same law with another value of one parameter."""
    return _made(fn, parameters(fn) | {name: value})


def to_line(fn: dist.Distribution, name: str) -> Any:
    """Find the bijector from the real line to the values of a parameter: exp for a rate, say.

    It is the identity where NumPyro knows none.
    """
    while isinstance(fn, dist.ExpandedDistribution):
        fn = fn.base_dist
    if "." in name:
        return to_line(_inner(fn), name.partition(".")[2])
    try:
        return biject_to(fn.arg_constraints[name])
    except (NotImplementedError, AttributeError):
        return dist.transforms.IdentityTransform()


def _inner(fn: dist.Distribution) -> dist.Distribution:
    return bare(fn.base_dist)


def _own(fn: dist.Distribution) -> dict[str, Any]:
    if isinstance(fn, dist.ExpandedDistribution):
        return _own(fn.base_dist)
    inside = {f"base_dist.{name}": value for name, value in _own(_inner(fn)).items()} if _truncates(fn) else {}
    return inside | {name: getattr(fn, name) for name in fn.arg_constraints}


def _made(fn: dist.Distribution, values: dict[str, Array]) -> dist.Distribution:
    if isinstance(fn, dist.ExpandedDistribution):
        return _made(fn.base_dist, values)
    own = {name: value for name, value in values.items() if "." not in name}
    if not _truncates(fn):
        return type(fn)(**own, validate_args=False)
    inside = {name.partition(".")[2]: value for name, value in values.items() if "." in name}
    return type(fn)(_made(_inner(fn), inside), **own, validate_args=False)


def _truncates(fn: dist.Distribution) -> bool:
    return isinstance(fn, TRUNCATED)
