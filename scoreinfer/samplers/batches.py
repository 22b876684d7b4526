"""Weighted draws of one observation, in batches of bounded memory. Each row has its own random key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._memory import each, map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites, Values
from scoreinfer.montecarlo.reference import AbstractReference, reference_rows
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted

BATCH = 1024
"""Rows per compiled call where the caller has no wish: far below a gigabyte in any dimension. Chosen by judgement."""
SMALLEST_BATCH = 512
"""Smallest number of rows per compiled call, so that few shapes are compiled. Chosen by judgement."""


def batch_shape(num: int, batch_size: int) -> int:
    """Choose the number of rows per compiled call: a power of two from `SMALLEST_BATCH` on, at most ``batch_size``."""
    return min(batch_size, max(SMALLEST_BATCH, 1 << max(num - 1, 1).bit_length()))


@over_devices
def draw_rows(key: Key, proposal: AbstractProposal, target: Target, rows: Int[Array, " num"]) -> Weighted:
    """Draw and weigh rows of the stream of draws of ``key``; row i depends on ``key`` and i only.

    Exactness: as for the proposal.
    """
    context = proposal.context(target)
    return each(lambda row: proposal.sample(jax.random.fold_in(key, row), target, context), target)(rows)


@over_devices
def weigh_rows(
    key: Key,
    proposal: AbstractProposal,
    target: Target,
    rows: Int[Array, " num"],
    z: Float[Array | np.ndarray, "num dim"],
) -> Weighted:
    """Weigh given values; row i uses the random numbers of row i of the stream of ``key``.

    Exactness: as for the proposal.
    """
    context = proposal.context(target)
    return each(lambda row, z: proposal.weigh(jax.random.fold_in(key, row), target, context, z), target)(rows, z)


def spaced(values: Float[Array | np.ndarray, "num dim"], most: int) -> Float[np.ndarray, "spaced dim"]:
    """Select at most ``most`` rows, evenly spaced."""
    num = min(most, len(values))
    return np.asarray(values)[np.arange(num) * len(values) // num]


def weigh_places(
    key: Key, proposal: AbstractProposal, target: Target, z: Float[Array | np.ndarray, "num dim"]
) -> Weighted:
    """Weigh given values, `SMALLEST_BATCH` at a time: one program serves every number of them.

    Exactness: as for the proposal.
    """
    return in_batches(lambda i: weigh_rows(key, proposal, target, i, z[i]), len(z), SMALLEST_BATCH)


class Defence(NamedTuple):
    """A second component that is mixed with a proposal (defensive mixture).

    Args:
        density: the density of the second component.
        share: share of the draws that come from it, between 0 and 1.
    """

    density: AbstractReference
    share: float


@eqx.filter_jit
def mixed(defence: Defence, drawn: Weighted) -> Weighted:
    """Turn weights under a proposal into weights under its mixture with a defence.

    1 / w_mix = (1 - s) / w + s r / p, with the weight w under the proposal, the density r of the defence, its share s
    and the target p.

    Exactness: exact in the same sense as the given weights.

    References: Hesterberg 1995, Technometrics 37(2) (defensive mixtures).
    """
    density, share = defence
    log_other = jax.vmap(density.log_density)(drawn.z) - drawn.log_target
    inverse = jnp.logaddexp(jnp.log1p(-share) - drawn.log_weight, jnp.log(share) + log_other)
    impossible = drawn.log_target == -jnp.inf  # weight zero, where the proposal's density is zero too
    return drawn._replace(log_weight=jnp.where(impossible, -jnp.inf, -inverse))


def weighted_draws(
    key: Key,
    proposal: AbstractProposal,
    target: Target,
    batch_size: int,
    defence: Defence | None,
    first: int,
    count: int,
    done: Callable[[int], Any] = lambda count: None,
) -> Weighted:
    """Draw rows ``first`` to ``first + count - 1`` of the stream of draws of ``key``.

    Args:
        key: random key.
        proposal: the proposal.
        target: the posterior of the observation.
        batch_size: largest number of rows per compiled call.
        defence: second component of the mixture. None means the proposal alone.
        first: number of the first row.
        count: number of rows.
        done: called after every batch with its number of rows.

    Exactness: exact in the same sense as the proposal's weights. With a ``defence`` the weights are those of the
        mixture.

    References: Hesterberg 1995, Technometrics 37(2) (defensive mixtures).
    """

    def batches(function, num):
        return in_batches(function, num, batch_shape(num, batch_size), done)

    if defence is None:
        return batches(lambda i: draw_rows(key, proposal, target, first + i), count)
    for_draws, for_paths, for_others = jax.random.split(key, 3)  # separate keys: draws and paths share row numbers
    from_others = _is_other(defence.share, first, count)
    ours, theirs = (jnp.asarray(first + np.flatnonzero(which)) for which in (~from_others, from_others))

    def other_rows(i: Int[Array, " num"]) -> Weighted:
        values = reference_rows(for_others, defence.density, theirs[i])
        return weigh_rows(for_paths, proposal, target, theirs[i], values)

    sources = ((ours, lambda i: draw_rows(for_draws, proposal, target, ours[i])), (theirs, other_rows))
    parts = [batches(function, rows.size) for rows, function in sources if rows.size]
    drawn = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[jnp.argsort(jnp.concatenate([ours, theirs]))], *parts)
    return mixed(defence, drawn)


def _is_other(share: float, first: int, count: int) -> np.ndarray:
    """Flag the rows that come from the defence; they are evenly spaced and have the given share."""
    edges = np.floor(share * np.arange(first, first + count + 1))
    return np.diff(edges) > 0


@over_devices
def _constrain(problem, values, y):
    return map_rows(lambda z: problem.sites(z, y), None)(values)


def constrain(problem: Problem, values: Float[Array, "num dim"], y: Sites, batch_size: int = 1024) -> Values:
    """Compute the constrained latent sites and the deterministic sites of every row, in batches."""
    num = values.shape[0]
    return in_batches(lambda i: _constrain(problem, values[i], y), num, batch_shape(num, batch_size))
