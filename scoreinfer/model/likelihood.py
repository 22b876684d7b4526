"""Separate likelihoods: a NumPyro model of the data given the parameters and the outputs of a foreign simulator."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.handlers import seed, trace

from scoreinfer._typing import Key, Sites
from scoreinfer.errors import UnsupportedModel
from scoreinfer.model.arguments import bind
from scoreinfer.model.assembly import read_problem
from scoreinfer.model.replay import fixed_key
from scoreinfer.problem import Problem


class _Rows(dist.Distribution):
    """A uniform choice of one of a few rows. It provides example values; its density (set to one) has no meaning."""

    support = constraints.real_vector

    def __init__(self, rows: Float[Array, "num size"]) -> None:
        self.rows = rows
        super().__init__(event_shape=rows.shape[1:])

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape size"]:
        """Draw rows."""
        return self.rows[jax.random.randint(key, sample_shape, 0, len(self.rows))]

    def log_prob(self, value: Float[Array, "*shape size"]) -> Float[Array, "*shape"]:
        """Return zero."""
        return jnp.zeros(value.shape[:-1], value.dtype)


def read_likelihood(likelihood: Callable[..., Any], parameters: Sites, outputs: Sites) -> Problem:
    """Read ``likelihood(parameters, outputs, ...data)`` as a problem whose latent vector is (parameters, outputs).

    The latent vector is the flat vector of the pair (parameters, outputs), in the order of
    `jax.flatten_util.ravel_pytree`. Every sample site of the likelihood is observed.

    Args:
        likelihood: a NumPyro model of the data.
        parameters: a few examples of the constrained parameters by site, draw axis first.
        outputs: the simulator's outputs at these parameters, by name.

    Raises:
        UnsupportedModel: if the likelihood has no sample site, or cannot be read.

    Exactness: exact: the log likelihood of the problem is the log density of the data.
    """
    first = jax.tree.map(lambda leaf: leaf[0], (parameters, outputs))
    rows = jax.vmap(lambda *pair: ravel_pytree(pair)[0])(parameters, outputs)
    unravel = ravel_pytree(first)[1]
    played = trace(seed(likelihood, fixed_key())).get_trace(*first)
    samples = [name for name, site in played.items() if site["type"] == "sample"]
    names = tuple(name for name in samples if not played[name]["infer"].get("is_auxiliary"))
    if not names:
        raise UnsupportedModel(
            "Expected a likelihood with sample sites, but it has no sample site. Write the data as "
            "`numpyro.sample(name, ..., obs=data)`."
        )

    def model(*args: Any, **kwargs: Any) -> None:
        likelihood(*unravel(numpyro.sample("parameters and outputs", _Rows(rows))), *args, **kwargs)

    problem = read_problem(model, *bind(model, (), {}, names))
    return dataclasses.replace(problem, recipe=partial(read_likelihood, likelihood, parameters, outputs))
