"""Embeddings: maps from standardised observed sites to one context vector."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.nets.mlp import ResidualMLP, linear

Embedding = Callable[[Sites], Float[Array, " features"]]
"""A map from standardised observed sites to one vector. To be trained and saved it must be an Equinox module."""


def flatten(sites: Sites) -> Float[Array, " features"]:
    """Concatenate all sites, in the order of their names, into one vector."""
    parts = [jnp.ravel(sites[name]) for name in sorted(sites)]
    return jnp.concatenate(parts).astype(jnp.float32) if parts else jnp.zeros(0, jnp.float32)


class Concatenate(eqx.Module):
    """The flat embedding: all observed numbers, concatenated."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return an empty dictionary: the embedding has no arguments."""
        return {}

    def __call__(self, sites: Sites) -> Float[Array, " features"]:
        """Concatenate the sites."""
        return flatten(sites)


class DeepSet(eqx.Module):
    """A permutation-invariant embedding of exchangeable entries x_i.

    The result is A [mean_i f(x_i), logsumexp_i f(x_i)], with a network f and a linear layer A. The exchangeable axis
    must be the first axis of every site and have the same length in all sites.

    Args:
        key: random key of the weights.
        num_entry: numbers per entry, over all sites.
        width: width of f.
        num_out: length of the context vector.

    References: Zaheer et al. 2017, arXiv 1703.06114, theorem 2.
    """

    inner: ResidualMLP
    outer: eqx.nn.Linear

    def __init__(self, key: Key, num_entry: int, *, width: int = 64, num_out: int = 64):
        first, last, outer = jax.random.split(key, 3)
        inner = ResidualMLP(first, num_entry, width, width=width, depth=2)
        self.inner = eqx.tree_at(lambda net: net.last, inner, linear(last, width, width))
        self.outer = linear(outer, 2 * width, num_out)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such an embedding, except the key."""
        inner = self.inner.first
        return {"num_entry": inner.in_features, "width": inner.out_features, "num_out": self.outer.out_features}

    def __call__(self, sites: Sites) -> Float[Array, " features"]:
        """Embed the set of entries along the first axis."""
        entries = jnp.concatenate(
            [jnp.reshape(sites[name], (sites[name].shape[0], -1)) for name in sorted(sites)], axis=1
        )
        values = jax.vmap(self.inner)(entries.astype(jnp.float32))
        return self.outer(jnp.concatenate([values.mean(0), jax.nn.logsumexp(values, axis=0)]))


class Series(eqx.Module):
    """An embedding of series along their first axis: three 1-D convolutions, then a linear layer.

    Args:
        key: random key of the weights.
        length: length of the series; convolutions have stride 2 from a length of 16 on.
        num_channels: numbers per time, over all sites.
        width: channels of the convolutions.
        num_out: length of the context vector.
    """

    layers: tuple[eqx.nn.Conv1d, ...]
    outer: eqx.nn.Linear
    length: int = eqx.field(static=True)

    def __init__(self, key: Key, length: int, num_channels: int, *, width: int = 32, num_out: int = 64):
        keys = jax.random.split(key, 4)
        sizes = [num_channels, width, width, width]
        self.layers = tuple(
            eqx.nn.Conv1d(
                sizes[i], width, 5, stride=2 if length >= 16 else 1, padding=2, dtype=jnp.float32, key=keys[i]
            )
            for i in range(3)
        )
        last = jax.eval_shape(
            lambda x: _convolve(self.layers, x), jax.ShapeDtypeStruct((num_channels, length), jnp.float32)
        )
        self.outer = linear(keys[3], last.shape[0] * last.shape[1], num_out)
        self.length = length

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such an embedding, except the key."""
        first, num_out = self.layers[0], self.outer.out_features
        sizes = {"num_channels": first.in_channels, "width": first.out_channels, "num_out": num_out}
        return {"length": self.length, **sizes}

    def __call__(self, sites: Sites) -> Float[Array, " features"]:
        """Embed the series."""
        columns = [jnp.reshape(sites[name], (sites[name].shape[0], -1)) for name in sorted(sites)]
        return self.outer(_convolve(self.layers, jnp.concatenate(columns, axis=1).T.astype(jnp.float32)).ravel())


def _convolve(layers, x):
    for layer in layers:
        x = jax.nn.silu(layer(x))
    return x
