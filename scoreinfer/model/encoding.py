"""Encoding of observed values as real numbers, according to the support of their site."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints

from scoreinfer.model.replay import unwrapped
from scoreinfer.model.survey import Row


def encoder(row: Row, support: constraints.Constraint | None) -> Callable[[Array], Array]:
    """Choose the map from observed values to real numbers.

    One-hot vectors for categories, (cos, sin) for angles, log(1 + x) for counts, log or logit for values with one or
    two bounds, and the bijector's inverse otherwise. Values of a boolean site, and of a support without a bijector,
    only become floats.

    Args:
        row: the static properties of the site.
        support: the support of the site. None means it depends on the latent sites; then values only become floats.
    """
    inner = None if support is None else unwrapped(support)
    num_classes = row.num_classes
    if num_classes is not None:
        return lambda x: jax.nn.one_hot(x, num_classes)
    if inner is constraints.circular:
        return lambda x: jnp.stack([jnp.cos(x), jnp.sin(x)], axis=-1)
    if inner is constraints.boolean or inner is None:
        return _as_float
    if isinstance(inner, constraints.multinomial):
        return lambda x: jnp.log1p(_as_float(x))
    if isinstance(inner, constraints.integer_interval):
        low, num = inner.lower_bound, inner.upper_bound - inner.lower_bound + 1
        binary = bool(np.all(np.asarray(num) <= 2))
        return lambda x: _as_float(x) - low if binary else jax.scipy.special.logit((_as_float(x) - low + 0.5) / num)
    if isinstance(inner, constraints.integer_greater_than):
        return lambda x: jnp.log1p(_as_float(x) - inner.lower_bound)
    if isinstance(inner, constraints.greater_than):
        low = getattr(inner, "lower_bound", 0.0)
        return lambda x: _log(_as_float(x) - low)
    if isinstance(inner, constraints.less_than):
        return lambda x: _log(inner.upper_bound - _as_float(x))
    if isinstance(inner, constraints.interval):
        low, width = inner.lower_bound, inner.upper_bound - inner.lower_bound
        return lambda x: _logit((_as_float(x) - low) / width)
    return _through_bijector(support)


def _through_bijector(support: constraints.Constraint) -> Callable[[Array], Array]:
    try:
        bijector = biject_to(support)
    except NotImplementedError:
        return _as_float
    if unwrapped(support) is constraints.simplex:
        return lambda x: bijector.inv(_inside_simplex(_as_float(x)))
    return lambda x: bijector.inv(_as_float(x))


def _as_float(x: Array) -> Array:
    return jnp.asarray(x, jnp.result_type(x, float))


def _log(x: Array) -> Array:
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _logit(x: Array) -> Array:
    eps = jnp.finfo(x.dtype).eps
    return jax.scipy.special.logit(jnp.clip(x, eps, 1 - eps))


def _inside_simplex(x: Array) -> Array:
    x = jnp.maximum(x, jnp.finfo(x.dtype).eps)
    return x / x.sum(-1, keepdims=True)


def fill(support: constraints.Constraint, mask: Array, value: Array) -> Array:
    """Replace the entries that the mask excludes (False) by one constant inside the support."""
    try:
        constant = support.feasible_like(value)
    except NotImplementedError:
        constant = jnp.zeros_like(value)
    return jnp.where(mask, value, constant)
