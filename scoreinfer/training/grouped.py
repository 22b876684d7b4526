"""Whitening of hierarchical models: groups with latents of their own, independent given the others.

    u = L(x)^{-1} (z - m(x)),   with L_gh = 0 for the latents of two different groups g and h.

One network, the same for all groups, computes mean, scales and the dependence on the shared latents from the token of a
group. So groups may be added without new weights, and a group without data is left to its prior.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.nets import MaskedGroups, ResidualMLP
from scoreinfer.problem import Problem

NUM_FEATURES = 16
"""Features of all groups that the network of one group sees. Chosen by judgement."""


class GroupWhitening(eqx.Module):
    """The learned affine map of every observation of a hierarchical model.

    Args:
        centre: mean of z in the prior.
        scale: standard deviation of z in the prior.
        embedding: the embedding of the groups.
        network: network of the shared latents, and of `NUM_FEATURES` features for the groups.
        each: network of the latents of one group.
        local: for every group, where its latents stand in z.

    Exactness: an invertible change of variables for any weights of the networks. Its Jacobian enters every importance
        weight.
    """

    centre: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    embedding: MaskedGroups
    network: ResidualMLP
    each: ResidualMLP
    local: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __call__(self, x: Sites) -> Affine:
        """Compute the affine map for one standardised observation."""
        centre, scale = jax.lax.stop_gradient((self.centre, self.scale))
        own, shared = np.asarray(self.local), _shared(self.local, centre.size)
        num, size = shared.size, own.shape[1]
        context, tokens, _ = self.embedding.parts(x)
        whole = self.network(context)
        features, whole = whole[:NUM_FEATURES], whole[NUM_FEATURES:]
        each = jax.vmap(lambda token: self.each(jnp.concatenate([token, features])))(tokens)
        mean = jnp.zeros_like(centre).at[shared].set(whole[:num]).at[own].set(each[:, :size])
        factor = jnp.zeros((centre.size, centre.size), jnp.float32)
        factor = factor.at[np.ix_(shared, shared)].set(_triangle(whole[num:], num))
        couplings = each[:, size : size + size * num].reshape(len(own), size, num)
        factor = factor.at[own[:, :, None], shared[None, None, :]].set(couplings)
        triangles = jax.vmap(lambda row: _triangle(row, size))(each[:, size + size * num :])
        factor = factor.at[own[:, :, None], own[:, None, :]].set(triangles)
        return Affine(centre + scale * mean, scale[:, None] * jnp.tril(factor))


def _shared(local: tuple[tuple[int, ...], ...], dim: int) -> np.ndarray:
    return np.setdiff1d(np.arange(dim), np.asarray(local))


def _triangle(numbers: Float[Array, " numbers"], size: int) -> Float[Array, "size size"]:
    """Make a lower triangular matrix: log scales first, then the part below the diagonal."""
    triangle = jnp.diag(jnp.exp(4.0 * jnp.tanh(numbers[:size] / 4.0)))
    return triangle.at[jnp.tril_indices(size, -1)].set(numbers[size:])


def local_latents(problem: Problem, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Find, for every group, where its latents stand in z: those of sites with one row for each group."""
    starts = np.cumsum([0, *(site.size for site in problem.latents)])
    blocks = [
        np.arange(start, start + site.size).reshape(num_groups, -1)
        for site, start in zip(problem.latents, starts[:-1], strict=True)
        if site.shape[:1] == (num_groups,) and site.size % num_groups == 0
    ]
    return tuple(map(tuple, np.concatenate(blocks, axis=1).tolist())) if blocks else ()


def untrained_groups(
    key: Key, dim: int, x: Sites, embedding: MaskedGroups, local: tuple[tuple[int, ...], ...], *, width: int, depth: int
) -> GroupWhitening:
    """Make a whitening that is the identity map, for standardised observations like ``x``."""
    for_all, for_each = jax.random.split(key)
    size, num = len(local[0]), dim - math.prod(np.shape(local))
    num_context = jax.eval_shape(lambda x: embedding.parts(x)[0], x).size
    network = ResidualMLP(for_all, num_context, NUM_FEATURES + num + num * (num + 1) // 2, width=width, depth=depth)
    num_out = size + size * num + size * (size + 1) // 2
    each = ResidualMLP(for_each, embedding.num_token + NUM_FEATURES, num_out, width=max(width // 4, 16), depth=2)
    return GroupWhitening(jnp.zeros(dim, jnp.float32), jnp.ones(dim, jnp.float32), embedding, network, each, local)


@eqx.filter_jit
def standardised(whitening: GroupWhitening, z: Float[Array, "num dim"]) -> GroupWhitening:
    """Set a whitening to the mean and the standard deviation of z (draw axis first)."""
    centre, scale = jnp.asarray(z.mean(0), jnp.float32), jnp.asarray(z.std(0) + 1e-6, jnp.float32)
    return dataclasses.replace(whitening, centre=centre, scale=scale)
