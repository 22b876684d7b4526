"""Likelihoods given apart: a NumPyro model of the data, told the parameters and a foreign simulator's outputs."""

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
    """One of a few rows, where a model needs a value to be looked at; nobody asks for its density."""

    support = constraints.real_vector

    def __init__(self, rows: Float[Array, "num size"]) -> None:
        self.rows = rows
        super().__init__(event_shape=rows.shape[1:])

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape size"]:
        """Pick rows."""
        return self.rows[jax.random.randint(key, sample_shape, 0, len(self.rows))]

    def log_prob(self, value: Float[Array, "*shape size"]) -> Float[Array, "*shape"]:
        """Return zero."""
        return jnp.zeros(value.shape[:-1], value.dtype)


def read_likelihood(likelihood: Callable[..., Any], parameters: Sites, outputs: Sites) -> Problem:
    """Read ``likelihood(parameters, outputs, ...data)`` as a problem about both side by side.

    Its flat vector is that of the pair (parameters, outputs), by name, as `jax.flatten_util.ravel_pytree` lays it out.
    Every sample site of the likelihood is data.

    Args:
        likelihood: a NumPyro model of the data.
        parameters: a few examples of the constrained parameters, draw axis first.
        outputs: the simulator's outputs there.

    Raises:
        UnsupportedModel: where the likelihood has no sample site, or cannot be read.
    """
    first = jax.tree.map(lambda leaf: leaf[0], (parameters, outputs))
    rows = jax.vmap(lambda *pair: ravel_pytree(pair)[0])(parameters, outputs)
    unravel = ravel_pytree(first)[1]
    played = trace(seed(likelihood, fixed_key())).get_trace(*first)
    samples = [name for name, site in played.items() if site["type"] == "sample"]
    names = tuple(name for name in samples if not played[name]["infer"].get("is_auxiliary"))
    if not names:
        raise UnsupportedModel("The likelihood has no sample site: expected `numpyro.sample(name, ..., obs=data)`.")

    def model(*args: Any, **kwargs: Any) -> None:
        likelihood(*unravel(numpyro.sample("parameters and outputs", _Rows(rows))), *args, **kwargs)

    problem = read_problem(model, *bind(model, (), {}, names))
    return dataclasses.replace(problem, recipe=partial(read_likelihood, likelihood, parameters, outputs))
