"""Drawing: weighted draws of one observation in batches of bounded memory, each row tied to its own key."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Sites
from scoreinfer.problem import Problem


class Weighted(NamedTuple):
    """Draws in the unconstrained space with the two log densities their weights are made of."""

    values: Float[Array, "num dim"]
    log_q: Float[Array, " num"]
    log_joint: Float[Array, " num"]

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.values.shape[0]

    @property
    def log_weight(self) -> Float[Array, " num"]:
        """Log importance weights."""
        return self.log_joint - self.log_q


def weighted_draws(key, proposal, y, batch_size, prior_fraction, first, count, bar) -> Weighted:
    """Draw rows ``first`` to ``first + count`` of the endless stream of draws that belongs to ``key``."""
    from_prior = _is_prior(prior_fraction, first, count)
    parts = []
    for rows, draw in ((np.flatnonzero(~from_prior), _from_proposal), (np.flatnonzero(from_prior), _from_prior)):
        size = _batch_shape(len(rows), batch_size)
        for i in range(0, len(rows), size):
            chosen = rows[i : i + size]
            padded = np.resize(chosen, size)
            part = draw(key, proposal, y, jnp.asarray(first + padded), prior_fraction)
            parts.append(jax.tree.map(lambda leaf, n=len(chosen): leaf[:n], part))
            bar.update(len(chosen))
    order = jnp.argsort(jnp.asarray(np.concatenate([np.flatnonzero(~from_prior), np.flatnonzero(from_prior)])))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *parts)


def _is_prior(share: float, first: int, count: int) -> np.ndarray:
    """Flag the rows taken from the prior: evenly spread, the exact share of any long run."""
    edges = np.floor(share * np.arange(first, first + count + 1))
    return np.diff(edges) > 0


def _batch_shape(num: int, batch_size: int) -> int:
    """Round a small batch up to a power of two, so that few shapes are ever compiled."""
    return min(batch_size, max(64, 1 << max(num - 1, 1).bit_length()))


def _mixed(problem, z, log_q, share):
    if share == 0.0:
        return log_q
    return jnp.logaddexp(jnp.log1p(-share) + log_q, jnp.log(share) + problem.log_prior(z))


def _log_joint(problem, z, y):
    return problem.log_joint(z, y) if problem.has_density else jnp.full((), jnp.nan, z.dtype)


@eqx.filter_jit
def _from_proposal(key, proposal, y, rows, share):
    context = proposal.context(y)

    def one(row):
        z, log_q = proposal.propose(jax.random.fold_in(key, row), context)
        return Weighted(z, _mixed(proposal.problem, z, log_q, share), _log_joint(proposal.problem, z, y))

    return jax.vmap(one)(rows)


@eqx.filter_jit
def _from_prior(key, proposal, y, rows, share):
    context = proposal.context(y)

    def one(row):
        for_z, for_path = jax.random.split(jax.random.fold_in(key, row))
        z, _ = proposal.problem.simulate(for_z)
        log_q = proposal.log_q(for_path, context, z)
        return Weighted(z, _mixed(proposal.problem, z, log_q, share), _log_joint(proposal.problem, z, y))

    return jax.vmap(one)(rows)


@eqx.filter_jit
def _constrain(problem, values):
    return jax.vmap(problem.constrain)(values)


def constrain(problem: Problem, values: Float[Array, "num dim"], batch_size: int = 1024) -> Sites:
    """Compute latent and deterministic sites of every row, in batches of bounded memory."""
    num, size = values.shape[0], _batch_shape(values.shape[0], batch_size)
    parts = []
    for i in range(0, num, size):
        rows = jnp.minimum(i + jnp.arange(size), num - 1)
        parts.append(jax.tree.map(lambda leaf, n=min(size, num - i): leaf[:n], _constrain(problem, values[rows])))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
