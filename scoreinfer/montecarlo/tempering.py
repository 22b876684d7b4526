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

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.montecarlo.moves import AbstractMoves
from scoreinfer.montecarlo.population import ALWAYS, Population, first_population, resample
from scoreinfer.montecarlo.resampling import next_power, systematic

KEPT_SHARE = 0.7
"""Share of the effective sample size that a change of temperature keeps. Chosen by judgement: smaller shares make fewer
temperatures, and noisier evidence."""


class Tempered(NamedTuple):
    """A population on its way.

    Args:
        population: the particles, draws of reference^(1 - power) target^power.
        power: the target's share of that density; 1 at the end.
        kept: what the moves keep from one temperature to the next.
    """

    population: Population
    power: Float[Array, ""]
    kept: Any

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

    def at(self, values: Float[Array, "num dim"]) -> "Tempered":
        """Put the particles elsewhere."""
        return self._replace(population=self.population._replace(values=values))


def begin(moves: AbstractMoves, values: Float[Array, "num dim"], power: float = 0.0) -> Tempered:
    """Make a population that has not moved yet, at draws of the density of that power."""
    population = first_population(values, len(values))
    return Tempered(population, jnp.asarray(power, values.dtype), moves.begin(values))


@eqx.filter_jit
def advance(
    key: Key,
    moves: AbstractMoves,
    particles: Tempered,
    kept_share: float | Float[Array, ""] = KEPT_SHARE,
) -> Tempered:
    """Go to the next temperature, resample, and move; at the last temperature move only.

    Args:
        key: random key.
        moves: the moves, between a reference and a target.
        particles: the population.
        kept_share: share of the effective sample size that the change of temperature keeps; 1: move only.

    Exactness: averages and evidence are consistent as the population grows. With fixed temperatures and fixed moves
        the evidence would be unbiased.
    """
    for_rows, for_moves = jax.random.split(key)
    log_ratio, seen = moves.look(particles.values)
    power = jnp.where(kept_share < 1, next_power(log_ratio, kept_share, particles.power), particles.power)
    # Not the product alone: at the last temperature it would be 0 times minus infinity.
    log_weight = jnp.where(power > particles.power, (power - particles.power) * log_ratio, 0.0)
    population, rows = resample(for_rows, particles.population.weighed(log_weight), systematic, ALWAYS)
    seen = jax.tree.map(lambda leaf: leaf[rows], seen)
    values, kept = moves.move(for_moves, power, population.values, seen, particles.kept)
    return Tempered(population._replace(values=values), power, kept)
