r"""Hamiltonian Monte Carlo of one path, preconditioned by the precision of a Gaussian whose factor is L.

In coordinates v = L^T x the moves are plain: with momentum u ~ N(0, I) a leapfrog of size e is

    u <- u + (e/2) L^{-1} grad log p(x),    x <- x + e L^{-T} u,    u <- u + (e/2) L^{-1} grad log p(x).

References: Duane et al. 1987, Physics Letters B 195(2); Neal 2011, arXiv 1206.1901, section 4.1 (linear maps).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.montecarlo.langevin import metropolis
from scoreinfer.montecarlo.tridiagonal import BlockFactor, Path

LEAST_STEP = 0.5
"""Steps vary between this share of the step size and the whole, so that no orbit closes. Chosen by judgement."""


class Place(NamedTuple):
    """A path, its log density and gradient, and whatever was computed with it."""

    x: Path
    log_density: Float[Array, ""]
    gradient: Path
    more: Any


See = Callable[[Path], Place]
"""Computes everything at a path."""


def hamiltonian_step(
    key: Key, see: See, place: Place, factor: BlockFactor, step_size: Float[Array, ""], num_leapfrogs: int
) -> tuple[Place, Float[Array, ""]]:
    """Make one Hamiltonian move; return the new place, and the acceptance probability.

    Args:
        key: random key.
        see: computes the log density and its gradient.
        place: where the move starts.
        factor: L.
        step_size: e, at most.
        num_leapfrogs: number of leapfrogs.

    Exactness: exact: leaves the density invariant. A proposal whose density or gradient is not finite is rejected.
    """
    for_momentum, for_size, for_accept = jax.random.split(key, 3)
    u = jax.random.normal(for_momentum, place.x.shape, place.x.dtype)
    size = step_size * jax.random.uniform(for_size, (), place.x.dtype, LEAST_STEP, 1.0)

    def leapfrog(_: Any, state: tuple[Place, Path]) -> tuple[Place, Path]:
        place, u = state
        u = u + 0.5 * size * factor.solve(place.gradient)
        new = see(place.x + size * factor.solve_transposed(u))
        return new, u + 0.5 * size * factor.solve(new.gradient)

    new, after = jax.lax.fori_loop(0, num_leapfrogs, leapfrog, (place, u))
    log_ratio = new.log_density - place.log_density + 0.5 * ((u**2).sum() - (after**2).sum())
    finite = jnp.isfinite(log_ratio) & jnp.isfinite(new.gradient).all()
    return metropolis(for_accept, new, place, jnp.where(finite, log_ratio, -jnp.inf))
