"""Whitening: an affine map that depends on the observation and makes the posterior about standard normal.

    u = L(x)^{-1} (z - m(x))

A posterior is often far narrower than its prior, and its centre depends on the observation. The whitening map learns
this first, by Gaussian maximum likelihood. The score is then learned in the space of u. Training starts from the linear
regression of z on x, which is already the solution for linear-Gaussian models.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.nets import Embedding, MaskedGroups, MaskedRows, ResidualMLP
from scoreinfer.nets.embedding import flatten

MAX_FULL = 64
"""Largest dimension in which the network outputs the whole Cholesky factor, not only its diagonal. By judgement."""


class Whitening(eqx.Module):
    """The learned affine map of every observation.

    Exactness: an invertible change of variables for any weights of the network. Its Jacobian enters every importance
        weight.
    """

    slope: Float[Array, "dim features"]
    intercept: Float[Array, " dim"]
    residual: Float[Array, "dim dim"]
    embedding: Embedding
    network: ResidualMLP

    def __call__(self, x: Sites) -> Affine:
        """Compute the affine map for one standardised observation."""
        dim = self.intercept.size
        slope, intercept, residual = jax.lax.stop_gradient((self.slope, self.intercept, self.residual))
        output = self.network(self.embedding(x))
        shift, log_scale, lower = output[:dim], output[dim : 2 * dim], output[2 * dim :]
        triangle = jnp.diag(jnp.exp(4.0 * jnp.tanh(log_scale / 4.0)))
        if dim > 1 and lower.size:
            triangle = triangle.at[jnp.tril_indices(dim, -1)].set(lower)
        mean = intercept + slope @ summary(self.embedding, x) + residual @ shift
        return Affine(mean, residual @ triangle)


def summary(embedding: Embedding, x: Sites) -> Float[Array, " features"]:
    """Compute what the regression knows of an observation: all its numbers, or means over rows."""
    return embedding.summary(x) if isinstance(embedding, MaskedRows | MaskedGroups) else flatten(x)


def whitening_network(key: Key, dim: int, num_context: int, *, width: int, depth: int) -> ResidualMLP:
    """Make the untrained network: shift, log scales and, up to `MAX_FULL` dimensions, the part below the diagonal."""
    num_out = 2 * dim + (dim * (dim - 1) // 2 if dim <= MAX_FULL else 0)
    return ResidualMLP(key, num_context, num_out, width=width, depth=depth)


def untrained_whitening(key: Key, dim: int, x: Sites, embedding: Embedding, *, width: int, depth: int) -> Whitening:
    """Make a whitening that is the identity map, for standardised observations like ``x``."""
    features, context = summary(embedding, x), embedding(x)
    network = whitening_network(key, dim, context.size, width=width, depth=depth)
    slope, eye = jnp.zeros((dim, features.size), jnp.float32), jnp.eye(dim, dtype=jnp.float32)
    return Whitening(slope, jnp.zeros(dim, jnp.float32), eye, embedding, network)


@eqx.filter_jit
def regressed(whitening: Whitening, z: Float[Array, "num dim"], x: Sites) -> Whitening:
    """Set a whitening to the ridge regression of z on the standardised observations (draw axis first).

    With fewer simulations than features the equations of the simulations are solved instead: the same slope, from a
    matrix no larger than the simulations themselves.
    """
    features = jax.vmap(lambda x: summary(whitening.embedding, x))(x)
    centre, middle = features.mean(0), z.mean(0)
    f, r = features - centre, z - middle
    num, ridge = z.shape[0], 1e-4
    if f.shape[1] <= num:
        slope = jnp.linalg.solve(f.T @ f / num + ridge * jnp.eye(f.shape[1], dtype=f.dtype), f.T @ r / num).T
    else:
        slope = jnp.linalg.solve(f @ f.T / num + ridge * jnp.eye(num, dtype=f.dtype), r / num).T @ f
    error = r - f @ slope.T
    covariance = error.T @ error / num
    floor = 1e-8 * jnp.diagonal(r.T @ r / num) + 1e-12
    residual = jnp.linalg.cholesky(covariance + jnp.diag(floor))
    slope, intercept, residual = (jnp.asarray(part, jnp.float32) for part in (slope, middle - slope @ centre, residual))
    return dataclasses.replace(whitening, slope=slope, intercept=intercept, residual=residual)
