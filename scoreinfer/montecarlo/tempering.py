"""Tempered sequential Monte Carlo: walk a population of particles from a reference density to a target.

With log ratios l_i = log p(z_i) - log r(z_i) of target and reference, a step from power b to power b' is

    weigh by exp((b' - b) l_i);  resample;  move, leaving r^(1 - b') p^b' invariant.

The power b' is chosen such that the weights keep a fixed share of the effective sample size.

These are the steps of a Feynman-Kac model (`scoreinfer.montecarlo.feynman_kac`) whose potentials depend on the old
state alone. Population, weighing and resampling are shared with it. The loop is not: it does not know how many
temperatures there will be, and its moves look at the whole population instead of one particle.

References: Del Moral, Doucet and Jasra 2006, JRSS B 68(3), section 3.3.2; Jasra et al. 2011, Scandinavian Journal of
Statistics 38(1) (temperatures by effective sample size).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._keys import keys_of
from scoreinfer._program import over_devices, run_once
from scoreinfer._typing import Key
from scoreinfer.montecarlo.moves import AbstractMoves, Seen
from scoreinfer.montecarlo.population import ALWAYS, Population, resample
from scoreinfer.montecarlo.resampling import next_power, systematic

KEPT_SHARE = 0.7
"""Share of the effective sample size that a change of temperature keeps. Chosen by judgement: smaller shares make fewer
temperatures, and noisier evidence."""
MAX_TEMPERATURES = 200
"""Number of temperatures after which tempering fails. Chosen by judgement."""


class Tempered(NamedTuple):
    """A population on its way.

    Args:
        population: the particles, draws of reference^(1 - power) target^power. Neighbours are states of one chain.
        power: the target's share of that density; 1 at the end.
        seen: what the moves know at the particles.
        adapted: what the moves adapt from one temperature to the next.
    """

    population: Population
    power: Float[Array, ""]
    seen: Seen
    adapted: Any

    @property
    def values(self) -> Float[Array, "num dim"]:
        """The particles."""
        return self.population.values

    @property
    def ancestors(self) -> Int[Array, " num"]:
        """Numbers of the first draws that they descend from."""
        return self.population.ancestors

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """Log of the ratio of normalising constants so far."""
        return self.population.log_evidence


@over_devices
def begin(moves: AbstractMoves, population: Population, power: Float[Array | np.ndarray, ""]) -> Tempered:
    """Make a population that has not moved yet, of draws of the density of that power."""
    values = population.values
    return Tempered(population, jnp.asarray(power, values.dtype), moves.see(values), moves.begin(values))


@over_devices
def elsewhere(moves: AbstractMoves, particles: Tempered, values: Float[Array, "num dim"]) -> Tempered:
    """Put the particles elsewhere."""
    population = particles.population._replace(values=values)
    return particles._replace(population=population, seen=moves.see(values))


def advance(key: Key, moves: AbstractMoves, particles: Tempered, kept_share: Float[Array | np.ndarray, ""]) -> Tempered:
    """Go to the next temperature, resample, and move; at the last temperature move only.

    Args:
        key: random key.
        moves: the moves, between a reference and a target.
        particles: the population; a multiple of the moves' chain length.
        kept_share: share of the effective sample size that the change of temperature keeps; 1: move only.

    Exactness: averages and evidence are consistent as the population grows. With fixed temperatures and fixed moves
        the evidence would be unbiased.
    """
    length = moves.chain_length
    cooled, starts, for_moves = _cooled(key, particles, kept_share, length)
    population, power = cooled.population, cooled.power
    values, seen, adapted = moves.move(for_moves, power, cooled.values, cooled.seen, starts, cooled.adapted)
    return Tempered(population._replace(values=values), power, seen, adapted)


def walk(key: Key, moves: AbstractMoves, particles: Tempered) -> Tempered:
    """Move the particles apart, and advance to power 1, or as far as `MAX_TEMPERATURES` temperatures reach.

    Exactness: as for `advance`.
    """
    kept_share = np.array(1.0)  # first the copies of the same draws are moved apart
    for _ in range(MAX_TEMPERATURES):
        key, for_pass, *_ = keys_of(key)
        particles = advance(for_pass, moves, particles, kept_share)
        if float(particles.power) == 1.0:
            break
        kept_share = np.array(KEPT_SHARE)
    return particles


@run_once
def _cooled(
    key: Key, particles: Tempered, kept_share: Float[Array | np.ndarray, ""], length: int
) -> tuple[Tempered, Int[Array, " chains"], Key]:
    """Choose the next temperature, weigh and resample; also choose the particles where chains of a length start.

    Every n-th of the resampled particles starts one, counted from a random one: that is systematic resampling again.
    """
    for_rows, for_first, for_moves = jax.random.split(key, 3)
    log_ratio, before = particles.seen.log_ratio, particles.power
    power = jnp.where(kept_share < 1, next_power(log_ratio, kept_share, before), before)
    # Not the product alone: at the last temperature it would be 0 times minus infinity.
    log_weight = jnp.where(power > before, (power - before) * log_ratio, 0.0)
    population, rows = resample(for_rows, particles.population.weighed(log_weight), systematic, ALWAYS)
    starts = jax.random.randint(for_first, (), 0, length) + jnp.arange(0, len(rows), length)
    population = population._replace(ancestors=jnp.repeat(population.ancestors[starts], length))
    seen = jax.tree.map(lambda leaf: leaf[rows], particles.seen)
    return Tempered(population, power, seen, particles.adapted), starts, for_moves
